"""The way into a guest over Firecracker's vsock: a unix socket on the host, a port in the guest.

The host's side of a connection is ``CONNECT <port>\\n``, answered with ``OK <number>\\n``, or with
its end if nobody listens there (docs/vsock.md in Firecracker's sources). In the guest the agent's
relay listens, and is told which TCP port is meant: see ``images/agent/agent.c``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from collections.abc import Callable

from pytest_smolvm.backends.forwarded import cannot_forward
from pytest_smolvm.errors import BackendError, OperationTimeoutError
from pytest_smolvm.hostloop import await_result, call_on_host_loop
from pytest_smolvm.process import Deadline, wait_readable

logger = logging.getLogger(__name__)

RELAY_PORT = 1024
AGENT_PORT = 1025
GUEST_CID = 3
_PAUSE_S = 0.01
_HANDSHAKE_TIMEOUT_S = 10.0
_OPEN_TIMEOUT_S = 10.0
_ACKNOWLEDGEMENT_LIMIT = 32
_BLOCK_BYTES = 1 << 16


def connect(
    path: str, port: int, deadline: Deadline, check_alive: Callable[[], object] = bool
) -> socket.socket:
    """A connection to the guest's vsock port, as soon as somebody listens there.

    ``check_alive`` raises when there is no use in waiting. Raises ``OperationTimeoutError``.
    """
    while True:
        check_alive()
        sock = _try_connect(path, port, deadline)
        if sock is not None:
            return sock
        if deadline.passed():
            raise OperationTimeoutError(
                f"connecting to the guest's vsock port {port}", deadline.timeout_s
            )
        # Nothing tells of a guest's listening.
        time.sleep(_PAUSE_S)


def _try_connect(path: str, port: int, deadline: Deadline) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(max(0.01, min(_HANDSHAKE_TIMEOUT_S, deadline.remaining_s())))
        sock.connect(path)
        sock.sendall(f"CONNECT {port}\n".encode())
        answer = b""
        while not answer.endswith(b"\n") and len(answer) < _ACKNOWLEDGEMENT_LIMIT:
            # Byte by byte: what comes after the line is the guest's.
            if not wait_readable(sock.fileno(), deadline.remaining_s()):
                break
            byte = sock.recv(1)
            if not byte:
                break
            answer += byte
        if answer.startswith(b"OK ") and answer.endswith(b"\n"):
            sock.settimeout(None)
            return sock
        if answer:
            raise BackendError(f"Firecracker's vsock answered {answer!r}, not 'OK'")
    except OSError as error:
        logger.debug("vsock port %d: %s", port, error)
    except BaseException:
        sock.close()
        raise
    sock.close()
    return None


class Forwards:
    """Ports of 127.0.0.1 that lead to ports of one guest."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._servers: dict[int, asyncio.Server] = {}
        self._guest_ports: dict[int, int] = {}
        self._under_way: set[asyncio.Task[None]] = set()

    @property
    def guest_ports(self) -> dict[int, int]:
        """The guest's ports, by the host's."""
        return dict(self._guest_ports)

    def open(self, guest_port: int, host_port: int) -> int:
        """Listen on ``host_port`` (0: any that is free); returns which it is."""

        async def serve() -> asyncio.Server:
            return await asyncio.start_server(
                lambda reader, writer: self._take(reader, writer, guest_port),
                "127.0.0.1",
                host_port,
            )

        try:
            server = await_result(
                serve(), operation="listening on 127.0.0.1", timeout_s=_OPEN_TIMEOUT_S
            )
        except (OSError, OverflowError) as error:
            raise cannot_forward(host_port, guest_port, str(error)) from error
        port: int = server.sockets[0].getsockname()[1]
        self._servers[port] = server
        self._guest_ports[port] = guest_port
        return port

    def close(self, host_port: int) -> None:
        """Listen there no more. Connections that are open stay."""
        server = self._servers.pop(host_port)
        del self._guest_ports[host_port]
        call_on_host_loop(server.close)

    def close_all(self) -> None:
        """End all of it."""
        for port in list(self._servers):
            self.close(port)

        async def end() -> None:
            tasks = list(self._under_way)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        await_result(end(), operation="closing forwarded ports", timeout_s=_OPEN_TIMEOUT_S)

    def _take(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, guest_port: int
    ) -> None:
        task = asyncio.get_running_loop().create_task(self._lead(reader, writer, guest_port))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _lead(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, guest_port: int
    ) -> None:
        """Carry one connection to the guest, until both sides have ended."""
        with contextlib.closing(writer):
            try:
                async with asyncio.timeout(_HANDSHAKE_TIMEOUT_S):
                    to_guest = await self._open(guest_port)
            except (OSError, TimeoutError) as error:
                logger.debug("port %d of the guest: %s", guest_port, error)
                return
            if to_guest is None:
                return
            guest_reader, guest_writer = to_guest
            with contextlib.closing(guest_writer):
                try:
                    async with asyncio.TaskGroup() as both:
                        both.create_task(_pump(reader, guest_writer))
                        both.create_task(_pump(guest_reader, writer))
                except* OSError as errors:
                    logger.debug("port %d of the guest: %s", guest_port, errors.exceptions)

    async def _open(
        self, guest_port: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        reader, writer = await asyncio.open_unix_connection(self._path)
        try:
            writer.write(f"CONNECT {RELAY_PORT}\n".encode())
            answer = await reader.readline()
            if answer.startswith(b"OK "):
                writer.write(struct.pack("<H", guest_port))
                return reader, writer
        except BaseException:
            writer.close()
            raise
        writer.close()
        return None


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_BLOCK_BYTES):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
