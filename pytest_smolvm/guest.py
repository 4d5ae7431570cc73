"""The inside of a VM: commands, files, variables and waits, over SSH."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import paramiko

from pytest_smolvm import command as commands
from pytest_smolvm import envvars, ssh, transfer
from pytest_smolvm.command import CommandResult
from pytest_smolvm.config import check_env_vars
from pytest_smolvm.connections import Connections
from pytest_smolvm.errors import OperationTimeoutError, SmolVMError
from pytest_smolvm.journal import Journal
from pytest_smolvm.process import Deadline

DEFAULT_COMMAND_TIMEOUT_S = 30.0
TRANSFER_TIMEOUT_S = 600.0
_POLL_S = 0.05
# A guest that switches itself off ends its SSH server seconds before the machine.
_DEATH_GRACE_S = 5.0
_LISTENERS = "cat /proc/net/tcp /proc/net/tcp6 2>/dev/null"
_LISTEN_STATE = "0A"  # include/net/tcp_states.h


@dataclass
class _Notes:
    """What is to be written into the journal of a command that is still under way."""

    result: CommandResult | None = None
    tries: int = 0


class Guest:
    """Commands and files in one guest, over connections that are kept and renewed.

    ``check_usable`` raises when the machine cannot be talked to (ended, paused),
    after giving a dying one so many seconds to be seen dead. ``circumstances`` tells what may
    explain that the guest does not answer. ``is_up``: whether the guest has said that its SSH
    server listens.
    """

    def __init__(
        self,
        address: tuple[str, int],
        login: ssh.Login,
        check_usable: Callable[[float], None],
        circumstances: Callable[[], str],
        journal: Journal,
        is_up: Callable[[], bool] = lambda: True,
    ) -> None:
        self._check_usable = check_usable
        self._circumstances = circumstances
        self._journal = journal
        self._connections = Connections(address, login, lambda: check_usable(0), is_up)

    def connect(self, deadline: Deadline, *, is_up: bool = False) -> float:
        """Wait for the SSH server and log in; returns when the banner came (monotonic).

        ``is_up``: the guest has answered before.
        """
        return self._connections.open(deadline, is_up=is_up)

    def connect_on(self, sock: socket.socket, deadline: Deadline) -> None:
        """Log in over an open socket that leads to an SSH server of the guest."""
        with self._explained("the login", deadline):
            self._connections.open_on(sock, deadline)

    def disconnect(self) -> None:
        self._connections.close()

    def run(
        self,
        command: str | Sequence[str],
        timeout: float = DEFAULT_COMMAND_TIMEOUT_S,
        *,
        check: bool = False,
        **options: Unpack[commands.RunOptions],
    ) -> CommandResult:
        """See ``SmolVM.run``."""
        with self._noted(command) as notes:
            notes.result = self._run(command, timeout, **options)
        return notes.result.check() if check else notes.result

    def ask(self, command: str, timeout: float, *, shell: commands.Shell = "raw") -> CommandResult:
        """Run a command of the library's own, which nobody needs to hear of."""
        return self._run(command, timeout, shell=shell, kill_timeout_s=1.0)

    def _run(
        self,
        command: str | Sequence[str],
        timeout: float,
        **options: Unpack[commands.RunOptions],
    ) -> CommandResult:
        deadline = Deadline(timeout)
        with (
            self._explained(f"the command {command!r}", deadline),
            self._connections.lend(deadline) as transport,
        ):
            return commands.run(transport, command, deadline, **options)

    @contextlib.contextmanager
    def _noted(self, command: str | Sequence[str]) -> Iterator[_Notes]:
        """Write into the journal what comes of a command, or of a wait for one."""
        notes = _Notes()
        began = time.monotonic()
        try:
            yield notes
        except BaseException as error:
            # Ctrl-C too: what a test hung in is what one wants to know afterwards.
            self._journal.note(
                command,
                time.monotonic() - began,
                None,
                stdout=getattr(error, "stdout", ""),
                stderr=getattr(error, "stderr", ""),
                error=str(error).partition("\n")[0] or type(error).__name__,
                tries=max(1, notes.tries),
            )
            raise
        if notes.result is not None:
            self._journal.note(
                command,
                time.monotonic() - began,
                notes.result.exit_code,
                stdout=notes.result.stdout,
                stderr=notes.result.stderr,
                tries=max(1, notes.tries),
            )

    def put(self, local: str | Path, remote: str, timeout: float) -> None:
        transfer.put(self._executor(f"put {local} to {remote}", timeout), Path(local), remote)

    def get(self, remote: str, local: str | Path, timeout: float) -> None:
        transfer.get(self._executor(f"get {remote}", timeout), remote, Path(local))

    def read_text(self, path: str) -> str:
        # One byte more than may be, so that too many are noticed.
        limit = commands.OUTPUT_LIMIT_BYTES
        data = bytearray()
        run = self._executor(f"read {path}", TRANSFER_TIMEOUT_S)
        run(f"head -c {limit + 1} {commands.shell_line([path])}", None, data.extend)
        if len(data) > limit:
            raise SmolVMError(f"{path} in the guest has more than {limit >> 20} MiB: use get()")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise SmolVMError(
                f"{path} in the guest is not UTF-8 text ({error.reason} at byte {error.start}): "
                "use get() for other data"
            ) from None

    def write_text(self, path: str, text: str) -> None:
        run = self._executor(f"write {path}", TRANSFER_TIMEOUT_S)
        run(transfer.write_line(path, "", None), text.encode(), bytes)

    def list_env_vars(self) -> dict[str, str]:
        quoted = commands.shell_line([envvars.ENV_FILE])
        chunks: list[bytes] = []
        run = self._executor("read the environment file", DEFAULT_COMMAND_TIMEOUT_S)
        run(f"[ ! -e {quoted} ] || cat {quoted}", None, chunks.append)
        return envvars.parse(b"".join(chunks).decode(errors="replace"))

    def set_env_vars(self, variables: Mapping[str, str], *, merge: bool = True) -> list[str]:
        try:
            wanted = check_env_vars(variables)
        except (ValueError, AttributeError) as error:
            raise SmolVMError(str(error)) from None
        if merge:
            wanted = {**self.list_env_vars(), **wanted}
        self._write_env_vars(wanted)
        return sorted(wanted)

    def unset_env_vars(self, keys: Sequence[str]) -> dict[str, str]:
        names = [keys] if isinstance(keys, str) else list(keys)
        present = self.list_env_vars()
        removed = {name: present.pop(name) for name in names if name in present}
        if removed:
            self._write_env_vars(present)
        return removed

    def _write_env_vars(self, variables: Mapping[str, str]) -> None:
        file = commands.shell_line([envvars.ENV_FILE])
        folder = commands.shell_line([envvars.ENV_FILE.rpartition("/")[0]])
        new = commands.shell_line([f"{envvars.ENV_FILE}.new"])
        # Moved into place: a login that comes in between sees the old or the new.
        run = self._executor("write the environment file", DEFAULT_COMMAND_TIMEOUT_S)
        run(
            f"mkdir -p {folder} && cat > {new} && chmod 644 {new} && mv {new} {file}",
            envvars.render(variables).encode(),
            bytes,
        )

    def wait_until(
        self, command: str | Sequence[str], timeout: float, interval: float = _POLL_S
    ) -> CommandResult:
        """See ``SmolVM.wait_until``."""
        with self._noted(command) as notes:
            notes.result = self._poll_until(command, timeout, interval, notes)
        return notes.result

    def _poll_until(
        self, command: str | Sequence[str], timeout: float, interval: float, notes: _Notes
    ) -> CommandResult:
        deadline = Deadline(timeout)
        last: CommandResult | None = None
        last_try, stdout, stderr = "no try came to an end", "", ""
        while not deadline.passed():
            notes.tries += 1
            try:
                last = self._run(command, deadline.remaining_s())
            except OperationTimeoutError as error:
                if last is None:
                    last_try += f": {error.message}"
                    stdout, stderr = error.stdout, error.stderr
                break
            if last.ok:
                return last
            last_try, stdout, stderr = f"last try: {last.describe()}", last.stdout, last.stderr
            time.sleep(min(interval, deadline.remaining_s()))
        raise OperationTimeoutError(
            f"waiting until {command!r} succeeds", timeout, last_try, stdout=stdout, stderr=stderr
        )

    def wait_for_port(self, guest_port: int, timeout: float) -> None:
        """See ``SmolVM.wait_for_port``."""
        deadline = Deadline(timeout)
        ports: set[int] = set()
        last_try = "the guest did not answer"
        while not deadline.passed():
            # The kernel's own table: nothing is sent to the service that is waited for.
            try:
                tables = self.ask(_LISTENERS, deadline.remaining_s()).stdout
            except OperationTimeoutError as error:
                if not ports:
                    last_try = error.reason
                break
            ports = listening_ports(tables)
            if guest_port in ports:
                return
            last_try = f"at the last try, ports in use were {sorted(ports) or 'none'}"
            time.sleep(min(_POLL_S, deadline.remaining_s()))
        raise OperationTimeoutError(
            f"waiting for port {guest_port} in the guest",
            timeout,
            last_try,
            {"guest_port": guest_port, "listening": sorted(ports)},
        )

    def _executor(self, operation: str, timeout_s: float) -> transfer.Execute:
        def execute(line: str, stdin: bytes | None, on_stdout: Callable[[bytes], object]) -> None:
            errors = bytearray()
            deadline = Deadline(timeout_s)
            with (
                self._explained(operation, deadline),
                self._connections.lend(deadline) as transport,
            ):
                status = commands.execute(
                    transport,
                    line,
                    deadline=deadline,
                    stdin=stdin,
                    on_stdout=on_stdout,
                    on_stderr=errors.extend,
                )
            if status != 0:
                said = errors.decode(errors="replace").strip() or f"exit status {status}"
                hint = (
                    " (the disk of this VM is read-only: disk_mode='shared' lets many VMs use one "
                    "image; use 'isolated' for a disk that can be written to)"
                    if "Read-only file system" in said
                    else ""
                )
                raise SmolVMError(f"{operation} in the guest failed: {said}{hint}")

        return execute

    @contextlib.contextmanager
    def _explained(self, operation: str, deadline: Deadline) -> Iterator[None]:
        """A connection that breaks becomes an error that says why: often, a dead machine.

        So does a guest that does not answer, whatever step it was that took too long.
        """
        try:
            yield
        except OperationTimeoutError as error:
            if error.details.get("killed"):
                raise  # it answers: only the command was slow
            self._check_usable(0)
            raise OperationTimeoutError(
                operation,
                deadline.timeout_s,
                f"{error.reason or 'the guest does not answer'}{self._circumstances()}",
                error.details,
                stdout=error.stdout,
                stderr=error.stderr,
            ) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            self._check_usable(_DEATH_GRACE_S)
            raise SmolVMError(
                f"the SSH connection was lost during {operation}: {error or type(error).__name__}"
            ) from error


def listening_ports(tables: str) -> set[int]:
    """The ports with a listener in the text of /proc/net/tcp and tcp6."""
    ports = set()
    for line in tables.splitlines():
        fields = line.split()
        if len(fields) > 3 and fields[3] == _LISTEN_STATE and ":" in fields[1]:
            ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports
