"""One Firecracker process: started in its room, spoken to, seen to its end."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from pytest_smolvm import diagnosis
from pytest_smolvm.backends import firecracker_api as api
from pytest_smolvm.backends.base import MachineEnd, MachineSpec
from pytest_smolvm.backends.console import Console
from pytest_smolvm.backends.nat import Nat, nat_for
from pytest_smolvm.backends.rooms import OpenRoom, Room, room_for
from pytest_smolvm.confinement import Limits
from pytest_smolvm.errors import BackendError, OperationTimeoutError
from pytest_smolvm.process import Deadline, MachineProcess

API_SOCKET = "api.sock"
VSOCK = "v.sock"
TAP = "guest0"
_LOG = "firecracker.log"
_METRICS = "firecracker.metrics"
_OWN_MEMORY_BYTES = 1 << 30
_OWN_FILE_BYTES = 64 << 20
_START_PAUSE_S = 0.005
_LOG_SHOWN_BYTES = 4000
_LOOK_FOR_END_S = 1.0


def _limits_of(spec: MachineSpec) -> Limits:
    memory = spec.mem_size_mib << 20
    disk = 0 if spec.disk.read_only else spec.disk.image.path.stat().st_size
    return Limits(
        data_bytes=memory + _OWN_MEMORY_BYTES, file_bytes=max(disk, memory) + _OWN_FILE_BYTES
    )


class FirecrackerProcess:
    """What runs one machine until that ends, or is reset.

    ``folder`` is an open descriptor, by way of which the process's directory is found: a socket's
    path may have 107 bytes, ours may be longer.
    """

    def __init__(self, binary: str, spec: MachineSpec, folder: int) -> None:
        self._binary = binary
        self._spec = spec
        self._folder = folder
        self.room: Room = OpenRoom(spec.directory)
        self.release = api.SPOKEN
        """Which release it is, once it was asked."""
        self._api_path = f"/proc/self/fd/{folder}/{API_SOCKET}"
        self._process: MachineProcess | None = None
        self._console: Console | None = None
        self._nat: Nat | None = None
        self._api: api.Api | None = None

    @contextlib.contextmanager
    def starting(self, what: str, deadline: Deadline) -> Iterator[api.Api]:
        """Start it; its API. What goes wrong is told together with the process's end."""
        try:
            yield self._launch(deadline)
        except (BackendError, OperationTimeoutError) as error:
            end = self.ended(_LOOK_FOR_END_S)
            if end is None and isinstance(error, OperationTimeoutError):
                raise
            ended = f"; it ended with exit status {end.exit_status}" if end else ""
            said = end.output if end else self._last_words()
            raise BackendError(
                f"Firecracker {what}: {error.message}{ended}{f': {said}' if said else ''}\n"
                f"command line: {' '.join(self.command_line)}",
                error.details,
                exit_status=end.exit_status if end else None,
                command_line=self.command_line,
            ) from error

    @property
    def client(self) -> api.Api:
        assert self._api is not None  # noqa: S101 - started
        return self._api

    @property
    def pid(self) -> int:
        assert self._process is not None  # noqa: S101 - started
        return self._process.pid

    @property
    def command_line(self) -> list[str]:
        return self._process.argv if self._process else [self._binary]

    @property
    def has_given_sign(self) -> bool:
        return self._console is not None and self._console.has_sign

    def flush_console(self) -> None:
        if self._console is not None:
            self._console.flush()

    def ended(self, timeout_s: float) -> MachineEnd | None:
        """How it ended, or None while it runs, after waiting for ``timeout_s`` seconds at most."""
        if self._process is None:
            return None
        status = self._process.wait(timeout_s) if timeout_s else self._process.poll()
        if status is None:
            return None
        if self._console is not None:
            # Whoever hears of the end may want to read what came before it.
            self._console.finish()
        return MachineEnd(
            exit_status=status,
            output=self._last_words(),
            # It ends when its guest resets, for whatever reason, and for nothing else with 0.
            reason="guest-shutdown" if status == 0 else "",
            command_line=self.command_line,
            emulator="Firecracker",
        )

    def end(self) -> None:
        """End it now, and all that belongs to it."""
        with contextlib.ExitStack() as all_of_it:
            if self._api is not None:
                all_of_it.callback(self._api.close)
            if self._console is not None:
                all_of_it.callback(self._console.finish)
            if self._nat is not None:
                all_of_it.callback(self._nat.close)
            all_of_it.callback(self._leave)
            self.stop()

    def _leave(self) -> None:
        for name in (API_SOCKET, VSOCK):
            (self.room.directory / name).unlink(missing_ok=True)
        self.room.leave()

    def stop(self) -> None:
        """End it now; what is to be known of its end can be asked still."""
        if self._process is not None:
            self.room.end(self._process)

    def _launch(self, deadline: Deadline) -> api.Api:
        spec = self._spec
        self.room = room = self._enter_room()
        for name in (API_SOCKET, VSOCK):
            # It makes them, and does not start where they are.
            (room.directory / name).unlink(missing_ok=True)
        for name in (_LOG, _METRICS):
            room.make(name)
        spec.console.touch(mode=0o600)
        argv = room.command(
            self._binary,
            spec.vm_id,
            [
                *("--api-sock", API_SOCKET),
                *("--log-path", _LOG, "--level", "Warning", "--metrics-path", _METRICS),
            ],
        )
        self._nat = nat = nat_for(spec, TAP)
        ours, theirs = socket.socketpair()
        with contextlib.closing(theirs):
            self._process = MachineProcess(
                nat.wrap(argv) if nat else argv,
                cwd=spec.directory,
                log=spec.machine_log,
                pass_fds=nat.inherited if nat else (),
                limits=_limits_of(spec),
                # With a namespace, or a jail, they are given up once that is there.
                drop_capabilities=nat is None and room.may_drop_capabilities,
                # The guest's serial console is its standard output.
                stdout=theirs.fileno(),
            )
        self._console = Console(ours, spec.console, spec.console_sign)
        if nat is not None:
            nat.attach(self._process, deadline)
        self._wait_for_api(deadline)
        process = self._process
        self._api = api.Api(
            self._api_path, lambda: diagnosis.circumstances(process.pid, spec.console)
        )
        version = self._api.get("/version", api.Version).firecracker_version
        self.release = api.check_release(version)
        return self._api

    def _enter_room(self) -> Room:
        spec = self._spec
        room = room_for(spec.directory, spec.vm_id, self._binary)
        if spec.network == "nat" and not room.may_drop_capabilities:
            raise BackendError(
                "network='nat' and the jailer cannot be had together: unset SMOLVM_JAILER, or use "
                "network='isolated'",
                {"network": spec.network},
            )
        # Whoever has a path by way of the descriptor finds the new room behind it.
        entered = os.open(room.directory, os.O_RDONLY | os.O_DIRECTORY)
        os.dup2(entered, self._folder, inheritable=False)
        os.close(entered)
        return room

    def _wait_for_api(self, deadline: Deadline) -> None:
        assert self._process is not None  # noqa: S101 - started
        while True:
            if self._process.poll() is not None:
                raise BackendError("it ended as it started")
            with (
                contextlib.suppress(FileNotFoundError, ConnectionRefusedError),
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt,
            ):
                attempt.connect(self._api_path)
                return
            if deadline.passed():
                raise OperationTimeoutError("waiting for Firecracker's API", deadline.timeout_s)
            # It does not say when it listens.
            self._process.wait(_START_PAUSE_S)

    def _last_words(self) -> str:
        """The last of what it printed and logged."""
        printed = self._process.output_tail() if self._process else ""
        with contextlib.suppress(OSError):
            logged = (self.room.directory / _LOG).read_bytes()[-_LOG_SHOWN_BYTES:]
            printed += "\n" + logged.decode(errors="replace")
        return printed.strip()
