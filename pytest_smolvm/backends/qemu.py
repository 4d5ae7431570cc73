"""The QEMU backend: one process per machine, worked through QMP."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

from pytest_smolvm import diagnosis
from pytest_smolvm.backends.base import MachineEnd, MachineSpec
from pytest_smolvm.backends.console import Console
from pytest_smolvm.backends.forwarded import cannot_forward, check_forwarded
from pytest_smolvm.backends.nat import Nat, nat_for
from pytest_smolvm.backends.qemu_args import (
    Architecture,
    kernel_command_line,
    listening_address,
    qemu_argv,
)
from pytest_smolvm.backends.qmp import Monitor
from pytest_smolvm.backends.versions import version_of
from pytest_smolvm.confinement import Limits
from pytest_smolvm.disks import Disk, Image, ImageFormat, size_of
from pytest_smolvm.errors import BackendError, OperationTimeoutError, SmolVMError
from pytest_smolvm.process import Deadline, MachineProcess
from pytest_smolvm.usernet import GUEST_ADDRESS

logger = logging.getLogger(__name__)

_MAX_BANDWIDTH = 1 << 40  # bytes per second; the default is that of a network
_OWN_MEMORY_BYTES = 3 << 30
_OWN_FILE_BYTES = 64 << 20
_FAILED_LOAD_S = 1.0
_FINISHED_LOOK_S = 0.001
_FORWARD = re.compile(r"TCP\[HOST_FORWARD\]\s+\d+\s+\S+\s+(\d+)\s+\S+\s+(\d+)")


class QemuBackend:
    """Runs machines with one of QEMU's system emulators."""

    name = "qemu"
    can_restore = True
    disk_format: ImageFormat = "qcow2"
    saves_memory_apart = False

    def __init__(
        self,
        binary: str,
        architecture: Architecture,
        accelerator: str,
        reasons: tuple[str, ...] = (),
    ) -> None:
        self.binary = binary
        self.architecture = architecture
        self.accelerator = accelerator
        self.reasons = reasons

    def version(self) -> str:
        return version_of(self.binary, r"version (\d[\w.]*)")

    def launch(self, spec: MachineSpec, deadline: Deadline) -> QemuMachine:
        """Start QEMU and greet it; the guest boots on while this returns."""
        settled = kernel_command_line(spec.boot_args, self.architecture, spec.disk.read_only)
        logger.debug("%s: boot arguments asked for: %s", spec.vm_id, spec.boot_args)
        logger.debug("%s: kernel command line: %s", spec.vm_id, settled)
        _check_kernel(spec.kernel, self.architecture)
        nat = nat_for(spec)
        with contextlib.ExitStack() as ours_only:
            with contextlib.ExitStack() as handed_over:
                monitor, monitor_fd = _socket_pair(ours_only, handed_over)
                port, port_fd = _socket_pair(ours_only, handed_over)
                console, console_fd = _socket_pair(ours_only, handed_over)
                state_fd = -1
                if spec.state is not None:
                    state_fd = handed_over.enter_context(spec.state.open("rb")).fileno()
                argv = qemu_argv(
                    spec,
                    self.architecture,
                    binary=self.binary,
                    monitor_fd=monitor_fd,
                    port_fd=port_fd,
                    console_fd=console_fd,
                )
                inherited = [fd for fd in (monitor_fd, port_fd, console_fd, state_fd) if fd >= 0]
                if nat is not None:
                    ours_only.callback(nat.close)
                    argv = nat.wrap(argv)
                    inherited += nat.inherited
                spec.console.touch(mode=0o600)
                process = MachineProcess(
                    argv,
                    cwd=spec.directory,
                    log=spec.machine_log,
                    pass_fds=inherited,
                    limits=_limits_of(spec),
                    drop_capabilities=nat is None,  # it gives them up once it has its namespaces
                )
            # Only QEMU holds its ends now: should it die, ours will tell.
            machine = QemuMachine(
                spec, process, port, Console(console, spec.console, spec.console_sign), nat
            )
            ours_only.push(lambda *error: machine.kill() if error[0] else None)
            if nat is not None:
                nat.attach(process, deadline)
            machine.greet(monitor, deadline)
            if spec.state is not None:
                machine.load(state_fd, deadline)
            ours_only.pop_all()
        return machine

    def describe(self, spec: MachineSpec) -> list[str]:
        """QEMU's version, and its command line with what differs from VM to VM taken out."""
        anonymous = dataclasses.replace(
            spec,
            vm_id="vm",
            kernel=Path("kernel"),
            initrd=Path("initrd") if spec.initrd else None,
            disk=Disk(Image(Path("/disk"), "qcow2"), read_only=spec.disk.read_only),
            console=Path("console"),
            memory=None,
            state=None,
        )
        argv = qemu_argv(
            anonymous, self.architecture, binary="qemu", monitor_fd=0, port_fd=0, console_fd=0
        )
        return [self.name, self.version(), self.accelerator, *argv]


def _limits_of(spec: MachineSpec) -> Limits:
    """More than any machine of that kind was seen to take; emulation needs 1.25 GiB of it."""
    disk = 0 if spec.disk.read_only else size_of(spec.disk)
    memory = spec.mem_size_mib << 20
    return Limits(
        data_bytes=memory + _OWN_MEMORY_BYTES,
        # The tables of a qcow2 file take a part of 1/4000.
        file_bytes=max(disk + disk // 100, memory) + _OWN_FILE_BYTES,
    )


def _socket_pair(
    ours_only: contextlib.ExitStack, handed_over: contextlib.ExitStack
) -> tuple[socket.socket, int]:
    ours, theirs = socket.socketpair()
    ours_only.enter_context(contextlib.closing(ours))
    handed_over.enter_context(contextlib.closing(theirs))
    return ours, theirs.fileno()


def _check_kernel(kernel: Path, architecture: Architecture) -> None:
    """Refuse a file that QEMU would start and then wait on for ever."""
    try:
        with kernel.open("rb") as file:
            head = file.read(0x210)
    except OSError as error:
        raise BackendError(f"the kernel {kernel} cannot be read: {error.strerror}") from error
    kinds = {
        "x86_64": head[:4] == b"\x7fELF" or head[0x202:0x206] == b"HdrS",
        # Documentation/arch/arm64/booting.rst; the compressed form is gzip.
        "aarch64": head[0x38:0x3C] == b"ARM\x64" or head[:2] == b"\x1f\x8b",
    }
    if not kinds[architecture.name]:
        raise BackendError(
            f"{kernel} is not a kernel that QEMU can boot on {architecture.name}: it starts with "
            f"{head[:8].hex() or 'nothing'}; give an ELF vmlinux or a bzImage (x86), or an Image "
            "(arm64)",
            {"kernel": str(kernel)},
        )


class QemuMachine:
    """One QEMU process."""

    def __init__(
        self,
        spec: MachineSpec,
        process: MachineProcess,
        port: socket.socket,
        console: Console,
        nat: Nat | None = None,
    ) -> None:
        self._process = process
        self._console = console
        self._nat = nat
        self._listens_on = listening_address(spec)
        self._inner_ports: dict[int, int] = {}
        self._port = port
        self._monitor = Monitor(lambda: diagnosis.circumstances(process.pid, spec.console))
        self._monitor.on_reset = console.forget_sign
        self._has_shared_memory = spec.memory is not None and spec.memory.shared
        self._forwards: dict[int, int] = {}
        self._ssh_port = 0

    def greet(self, our_end: socket.socket, deadline: Deadline) -> None:
        """Connect the monitor and learn the SSH port. Raises ``BackendError`` if QEMU is gone."""
        try:
            self._monitor.connect(our_end, max(1.0, deadline.remaining_s()))
            self._ssh_port = next(host for host, guest in self._host_forwards() if guest == 22)
            if self._nat is not None:
                self._ssh_port = self._nat.forward(self._ssh_port, 0)
        except (ConnectionError, BackendError) as error:
            end = self.wait(5)
            if end is None:
                raise
            raise BackendError(
                f"QEMU ended as it started, with exit status {end.exit_status}: "
                f"{end.output or error}\ncommand line: {' '.join(end.command_line)}",
                exit_status=end.exit_status,
                command_line=end.command_line,
            ) from error

    def load(self, state_fd: int, deadline: Deadline) -> None:
        """Take over the saved state from the file that QEMU inherited as ``state_fd``."""
        self._migrate(
            "migrate-incoming",
            f"fd:{state_fd}",
            "load a saved state",
            deadline,
            ignore_shared=not self._has_shared_memory,
        )

    def save(self, state: Path, deadline: Deadline, memory: Path | None = None) -> None:
        assert memory is None  # noqa: S101 - not saves_memory_apart
        self._monitor.execute("migrate-set-parameters", {"max-bandwidth": _MAX_BANDWIDTH})
        descriptor = os.open(state, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            self._monitor.send_descriptor(descriptor, "state")
            self._migrate(
                "migrate",
                "fd:state",
                "save the machine's state",
                deadline,
                ignore_shared=self._has_shared_memory,
            )
        finally:
            os.close(descriptor)
        # Told to be complete, it is not quite: until then the machine refuses to go on.
        while self._monitor.execute("query-status")["status"] == "finish-migrate":
            if deadline.passed():
                raise OperationTimeoutError("saving the machine's state", deadline.timeout_s)
            time.sleep(_FINISHED_LOOK_S)

    def _migrate(
        self, command: str, uri: str, what: str, deadline: Deadline, *, ignore_shared: bool
    ) -> None:
        capabilities = {"events": True, "x-ignore-shared": ignore_shared}
        ended = self._monitor.migrate(
            command, uri, capabilities, lambda: self.poll() is None, deadline
        )
        if ended != "completed":
            # One that cannot load a state ends; one that cannot save it runs on, and tells.
            end = self.wait(_FAILED_LOAD_S)
            said = end.output if end else self._monitor.execute("query-migrate").get("error-desc")
            raise BackendError(f"QEMU could not {what}: {said or ended}")

    @property
    def port(self) -> socket.socket:
        return self._port

    def open_port(self, deadline: Deadline) -> socket.socket:  # noqa: ARG002
        return self._port  # there from the start

    def resume_with(self, message: bytes, deadline: Deadline) -> None:
        self._port.settimeout(max(0.01, deadline.remaining_s()))
        try:
            self._port.sendall(message)
        finally:
            self._port.settimeout(None)
        self.resume()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def command_line(self) -> list[str]:
        return self._process.argv

    @property
    def ssh_address(self) -> tuple[str, int]:
        return "127.0.0.1", self._ssh_port

    def poll(self) -> MachineEnd | None:
        status = self._process.poll()
        return None if status is None else self._end(status)

    @property
    def has_given_sign(self) -> bool:
        return self._console.has_sign

    def flush_console(self) -> None:
        self._console.flush()

    def wait(self, timeout_s: float) -> MachineEnd | None:
        status = self._process.wait(timeout_s)
        return None if status is None else self._end(status)

    def _end(self, status: int) -> MachineEnd:
        # Whoever hears of the end may want to read what came before it.
        self._console.finish()
        return MachineEnd(
            exit_status=status,
            output=self._process.output_tail(),
            reason=self._monitor.shutdown_reason,
            command_line=self.command_line,
        )

    def booted(self) -> None:
        self._monitor.execute("set-action", {"reboot": "reset"})

    @property
    def stalled(self) -> str:
        why = self._monitor.io_error
        # Several requests may have failed, and word of the last come when all is well again.
        if why and self._monitor.execute("query-status")["status"] == "running":
            self._monitor.io_error = why = ""
        return why

    def when_stalled(self, notify: Callable[[], object]) -> None:
        def look() -> None:
            with contextlib.suppress(BackendError, OperationTimeoutError):  # its end is seen, too
                if self.stalled:
                    notify()

        self._monitor.on_io_error = look

    def pause(self) -> None:
        self._monitor.execute("stop")

    def resume(self) -> None:
        self._monitor.io_error = ""
        self._monitor.execute("cont")

    @property
    def power_off_program(self) -> str:
        return "poweroff"

    def press_power_button(self) -> None:
        self._monitor.execute("system_powerdown")

    def reset(self) -> None:
        self._monitor.execute("system_reset")

    @property
    def resets(self) -> int:
        return self._monitor.resets

    def wait_for_reset(self, since: int, deadline: Deadline) -> bool:
        return self._monitor.wait_for_reset(since, deadline)

    def forward(self, guest_port: int, host_port: int) -> int:
        before = self._host_forwards()
        inner_port = 0 if self._nat else host_port
        answer = self._monitor.human(
            f"hostfwd_add net0 tcp:{self._listens_on}:{inner_port}-{GUEST_ADDRESS}:{guest_port}"
        ).strip()
        if answer:
            raise cannot_forward(host_port, guest_port, f"QEMU: {answer}")
        new = set(self._host_forwards()) - set(before)
        port = next(host for host, guest in new if guest == guest_port)
        if self._nat is not None:
            try:
                port, inner_port = self._nat.forward(port, host_port), port
            except SmolVMError as error:
                self._monitor.human(f"hostfwd_remove net0 tcp:{self._listens_on}:{port}")
                raise cannot_forward(host_port, guest_port, f"QEMU: {error.message}") from error
            self._inner_ports[port] = inner_port
        self._forwards[port] = guest_port
        return port

    @property
    def forwards(self) -> dict[int, int]:
        return dict(self._forwards)

    def unforward(self, host_port: int) -> None:
        check_forwarded(host_port, self._forwards)
        if self._nat is not None:
            self._nat.unforward(host_port)
        inner_port = self._inner_ports.pop(host_port, host_port)
        self._monitor.human(f"hostfwd_remove net0 tcp:{self._listens_on}:{inner_port}")
        del self._forwards[host_port]

    def _host_forwards(self) -> list[tuple[int, int]]:
        text = self._monitor.human("info usernet")
        return [(int(host), int(guest)) for host, guest in _FORWARD.findall(text)]

    def quit(self, timeout_s: float) -> None:
        deadline = Deadline(timeout_s)
        try:
            self._monitor.execute("quit", timeout_s=timeout_s)
        except (BackendError, OperationTimeoutError) as error:
            # It may be gone before it has answered.
            logger.debug("asked to quit: %s", error)
        self._process.wait(deadline.remaining_s())

    def kill(self) -> None:
        with contextlib.ExitStack() as all_of_it:
            if self._nat is not None:
                all_of_it.callback(self._nat.close)
            all_of_it.callback(self._monitor.close)
            all_of_it.callback(self._port.close)
            all_of_it.callback(self._console.finish)
            self._process.kill()
