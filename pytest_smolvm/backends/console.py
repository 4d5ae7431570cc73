"""A guest's console, written to a file that cannot grow without end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from pathlib import Path

from pytest_smolvm.hostloop import call_on_host_loop

logger = logging.getLogger(__name__)

LIMIT_BYTES = 8 << 20
"""How large the file gets before its middle is left out."""
KEPT_HEAD_BYTES = 1 << 20
KEPT_TAIL_BYTES = 2 << 20
_BLOCK_BYTES = 1 << 16
_BLOCKS_AT_ONCE = 64


class CappedLog:
    """A file that takes any number of bytes, and keeps the first and the last of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._left_out = 0
        self._lost = 0

    def write(self, data: bytes) -> None:
        """Append ``data``. What cannot be written, on a full disk say, is lost, and counted."""
        try:
            with self._path.open("ab") as file:
                self._path.chmod(0o600)
                if self._lost:
                    file.write(_note(f"{self._lost} bytes could not be written"))
                file.write(data)
                file.flush()
                size = file.tell()
            self._lost = 0
            if size > LIMIT_BYTES:
                self._leave_out_middle(size)
        except OSError as error:
            if not self._lost:
                logger.warning("%s cannot be written: %s", self._path, error.strerror)
            self._lost += len(data)

    def _leave_out_middle(self, size: int) -> None:
        new = self._path.with_name(f".{self._path.name}.new")
        try:
            with self._path.open("rb") as old, new.open("wb") as file:
                new.chmod(0o600)
                file.write(old.read(KEPT_HEAD_BYTES))
                old.seek(size - KEPT_TAIL_BYTES)
                self._left_out += size - KEPT_HEAD_BYTES - KEPT_TAIL_BYTES
                file.write(_note(f"some {self._left_out >> 10} KiB are left out here"))
                file.write(old.read())
            new.replace(self._path)  # whoever reads it has the one or the other, whole
        except OSError:
            new.unlink(missing_ok=True)
            raise


class Console:
    """Takes what comes from a guest's console out of a socket, for as long as that is open."""

    def __init__(self, our_end: socket.socket, path: Path, sign: bytes = b"") -> None:
        self._socket = our_end
        self._sign = sign
        self._before = b""
        self.has_sign = False
        """Whether ``sign`` has come."""
        self._log = CappedLog(path)
        self._guard = threading.Lock()
        our_end.setblocking(False)
        call_on_host_loop(self._start)

    def _start(self) -> None:
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._take)

    def forget_sign(self) -> None:
        """Wait for the sign to come again."""
        self.has_sign = False

    def flush(self) -> None:
        """Write what has come so far."""
        with self._guard:
            if self._socket.fileno() >= 0:
                call_on_host_loop(self._take_all)

    def finish(self) -> None:
        """Write what there is to write still; the machine has ended."""
        with self._guard:
            if self._socket.fileno() >= 0:
                call_on_host_loop(self._finish)

    def _take_all(self) -> None:
        # As much as the socket holds, and not what comes meanwhile: a flood has no end.
        for _ in range(_BLOCKS_AT_ONCE):
            if not self._take():
                return

    def _finish(self) -> None:
        while self._take():
            pass
        self._stop()

    def _take(self) -> bool:
        """Write one block; False if there was none."""
        if self._socket.fileno() < 0:
            return False
        try:
            data = self._socket.recv(_BLOCK_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            logger.debug("%s: %s", self._log, os.strerror(error.errno or 0))
            data = b""
        if data:
            self._log.write(data)
            self._look_for_sign(data)
        else:
            self._stop()
        return bool(data)

    def _look_for_sign(self, data: bytes) -> None:
        if self._sign:
            text = self._before + data
            self.has_sign = self.has_sign or self._sign in text
            self._before = text[-len(self._sign) + 1 :]

    def _stop(self) -> None:
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()


def _note(text: str) -> bytes:
    return f"\n[pytest-smolvm: {text}]\n".encode()
