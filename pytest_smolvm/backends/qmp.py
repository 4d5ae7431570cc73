"""QMP for synchronous callers: QEMU's monitor over a socket pair that only we hold."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qemu.qmp import (
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    QMPClient,
    QMPError,
    Runstate,
)

from pytest_smolvm.errors import BackendError, OperationTimeoutError
from pytest_smolvm.hostloop import await_result
from pytest_smolvm.process import Deadline

COMMAND_TIMEOUT_S = 30.0
_LOOK_S = 0.25
_MIGRATION_ENDS = ("completed", "failed", "cancelled")


class Monitor:
    """The monitor of one QEMU process; remembers the events that explain its end."""

    def __init__(self, circumstances: Callable[[], str] = str) -> None:
        """``circumstances`` tells what may explain that QEMU does not answer."""
        self._circumstances = circumstances
        self._client = QMPClient()  # with a name it would make a logger, which lives for ever
        self._listener = EventListener(names={"SHUTDOWN", "RESET", "MIGRATION", "BLOCK_IO_ERROR"})
        self._watcher: asyncio.Task[None] | None = None
        self._changed: asyncio.Condition | None = None
        self.shutdown_reason = ""
        self.resets = 0
        self.io_error = ""
        """Why the machine was stopped, if its disk could not be read or written."""
        self.on_reset: Callable[[], object] = lambda: None
        """Called on the host loop's thread."""
        self.on_io_error: Callable[[], object] = lambda: None
        self._migration = ""

    def connect(self, our_end: socket.socket, timeout_s: float) -> None:
        """Greet QEMU at the other end. Raises ``ConnectionError`` if it is gone."""

        async def connect() -> None:
            self._changed = asyncio.Condition()
            self._client.register_listener(self._listener)
            await self._client.connect(our_end)
            self._watcher = asyncio.create_task(self._watch())

        try:
            await_result(connect(), operation="greeting QEMU's monitor", timeout_s=timeout_s)
        except (QMPError, OSError, EOFError) as error:
            raise ConnectionError(str(error)) from error

    async def _watch(self) -> None:
        assert self._changed is not None  # noqa: S101 - set before this task starts
        async for event in self._listener:
            data: Any = event.get("data") or {}
            async with self._changed:
                if event["event"] == "RESET":
                    self.resets += 1
                    self.on_reset()
                elif event["event"] == "SHUTDOWN":
                    self.shutdown_reason = str(data.get("reason", ""))
                elif event["event"] == "MIGRATION":
                    self._migration = str(data.get("status", ""))
                elif event["event"] == "BLOCK_IO_ERROR" and data.get("action") == "stop":
                    self.io_error = f"{data.get('operation')}: {data.get('reason', 'an error')}"
                    # In a thread: it may take a while, and this one answers to everybody.
                    threading.Thread(target=self.on_io_error, daemon=True).start()
                self._changed.notify_all()

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Run a QMP command and return its result; ``timeout_s``: None means the usual.

        QEMU's refusal is a ``BackendError``; so is a monitor that is gone.
        """
        operation = f"QEMU's monitor command {command}"
        timeout_s = COMMAND_TIMEOUT_S if timeout_s is None else timeout_s
        try:
            with _explained(command):
                return await_result(
                    self._client.execute(command, dict(arguments or {})),
                    operation=operation,
                    timeout_s=timeout_s,
                )
        except OperationTimeoutError:
            raise OperationTimeoutError(
                operation,
                timeout_s,
                f"QEMU does not answer, and may do it still{self._circumstances()}",
            ) from None

    def human(self, command_line: str) -> str:
        """Run a command of the human monitor, for the few things that QMP lacks."""
        return str(self.execute("human-monitor-command", {"command-line": command_line}))

    def wait_for_reset(self, since: int, deadline: Deadline) -> bool:
        """Wait until the machine was reset more than ``since`` times, or the deadline."""

        async def wait() -> None:
            assert self._changed is not None  # noqa: S101 - connected
            async with self._changed:
                await self._changed.wait_for(lambda: self.resets > since)

        try:
            await_result(wait(), operation="the machine's reset", timeout_s=deadline.remaining_s())
        except OperationTimeoutError:
            return False
        return True

    def migrate(
        self,
        command: str,
        uri: str,
        capabilities: Mapping[str, bool],
        alive: Callable[[], bool],
        deadline: Deadline,
    ) -> str:
        """Start a migration, in or out, and wait for its end; returns how it ended.

        That is ``completed``, or something else if it failed; ``alive`` says whether QEMU is
        there still. Raises ``OperationTimeoutError`` past the deadline.
        """
        self._migration = ""
        wanted = [{"capability": name, "state": on} for name, on in capabilities.items()]
        steps: list[tuple[str, dict[str, Any]]] = [
            ("migrate-set-capabilities", {"capabilities": wanted}),
            (command, {"uri": uri}),
        ]

        async def go_on() -> None:
            # All in one: each visit to the loop's thread costs as much as QEMU's answer.
            while steps:
                await self._client.execute(*steps.pop(0))
            assert self._changed is not None  # noqa: S101 - connected
            async with self._changed:
                await self._changed.wait_for(lambda: self._migration in _MIGRATION_ENDS)

        while True:
            pause_s = min(_LOOK_S, deadline.remaining_s())
            try:
                with _explained(command):
                    await_result(go_on(), operation=f"QEMU's {command}", timeout_s=pause_s)
            except OperationTimeoutError:
                # Nothing tells of a QEMU that is gone.
                if not alive():
                    return "ended"
                if deadline.passed():
                    raise OperationTimeoutError(f"QEMU's {command}", deadline.timeout_s) from None
            else:
                return self._migration

    def send_descriptor(self, descriptor: int, name: str) -> None:
        """Give QEMU an open file, to be used as ``fd:name``."""

        async def send() -> None:
            self._client.send_fd_scm(descriptor)
            await self._client.execute("getfd", {"fdname": name})

        try:
            await_result(send(), operation="handing QEMU a file", timeout_s=COMMAND_TIMEOUT_S)
        except (QMPError, OSError) as error:
            raise BackendError(f"QEMU does not take a file: {error}") from error

    def close(self) -> None:
        """Hang up and let the tasks end; a QEMU that is gone already is no error."""

        async def close() -> None:
            if self._client.runstate is not Runstate.IDLE:
                with contextlib.suppress(QMPError, OSError, EOFError):
                    await self._client.disconnect()
            if self._watcher is not None:
                self._watcher.cancel()
                await asyncio.gather(self._watcher, return_exceptions=True)

        await_result(close(), operation="closing QEMU's monitor", timeout_s=COMMAND_TIMEOUT_S)


@contextlib.contextmanager
def _explained(command: str) -> Iterator[None]:
    """What the monitor's client raises becomes a ``BackendError``."""
    try:
        yield
    except ExecuteError as error:
        raise BackendError(f"QEMU refused {command}: {error}") from error
    except (ExecInterruptedError, QMPError, OSError) as error:
        raise BackendError(f"QEMU's monitor is gone, at {command}: {error}") from error
