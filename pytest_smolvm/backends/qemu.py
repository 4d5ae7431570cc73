"""The QEMU backend: one process per machine, worked through QMP."""

from __future__ import annotations

import logging
import re
import socket
from pathlib import Path

from pytest_smolvm.backends.base import MachineEnd, MachineSpec
from pytest_smolvm.backends.qemu_args import (
    Architecture,
    kernel_command_line,
    qemu_argv,
)
from pytest_smolvm.backends.qmp import Monitor
from pytest_smolvm.errors import BackendError, OperationTimeoutError, SmolVMError
from pytest_smolvm.process import Deadline, MachineProcess, ToolError, run_tool
from pytest_smolvm.usernet import GUEST_ADDRESS

logger = logging.getLogger(__name__)

_FORWARD = re.compile(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+(\d+)")


class QemuBackend:
    """Runs machines with one of QEMU's system emulators."""

    name = "qemu"

    def __init__(
        self,
        binary: str,
        architecture: Architecture,
        accelerator: str,
        why_not: tuple[str, ...] = (),
    ) -> None:
        self.binary = binary
        self.architecture = architecture
        self.accelerator = accelerator
        self.why_not = why_not

    def version(self) -> str:
        try:
            text = run_tool([self.binary, "--version"], timeout_s=10)
        except ToolError as error:
            logger.debug("%s", error)
            return ""
        found = re.search(r"version (\d[\w.]*)", text)
        return found[1] if found else ""

    def launch(self, spec: MachineSpec, deadline: Deadline) -> QemuMachine:
        """Start QEMU and greet it; the guest boots on while this returns."""
        settled = kernel_command_line(spec.boot_args, self.architecture, spec.disk.read_only)
        logger.debug("%s: boot arguments asked for: %s", spec.vm_id, spec.boot_args)
        logger.debug("%s: kernel command line: %s", spec.vm_id, settled)
        _check_kernel(spec.kernel, self.architecture)
        if spec.network == "nat":
            # QEMU's user network leads to the host's loopback as well as outside,
            # and has no switch for the one without the other.
            raise BackendError(
                "network='nat' cannot be had yet: QEMU's own network would let the guest reach "
                "the services of this host too. Use network='isolated', and put() what the guest "
                "needs.",
                {"network": spec.network},
            )
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                argv = qemu_argv(
                    spec, self.architecture, binary=self.binary, monitor_fd=theirs.fileno()
                )
                spec.console.touch(mode=0o600)
                process = MachineProcess(
                    argv, cwd=spec.directory, log=spec.machine_log, pass_fds=[theirs.fileno()]
                )
        except BaseException:
            ours.close()
            raise
        machine = QemuMachine(spec.vm_id, process)
        try:
            machine.greet(ours, deadline)
        except BaseException:
            ours.close()
            machine.kill()
            raise
        return machine


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

    def __init__(self, vm_id: str, process: MachineProcess) -> None:
        self._process = process
        self._monitor = Monitor(vm_id)
        self._forwards: dict[int, int] = {}
        self._ssh_port = 0

    def greet(self, our_end: socket.socket, deadline: Deadline) -> None:
        """Connect the monitor and learn the SSH port. Raises ``BackendError`` if QEMU is gone."""
        try:
            self._monitor.connect(our_end, max(1.0, deadline.remaining_s()))
            self._ssh_port = self._host_ports()[22]
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

    def wait(self, timeout_s: float) -> MachineEnd | None:
        status = self._process.wait(timeout_s)
        return None if status is None else self._end(status)

    def _end(self, status: int) -> MachineEnd:
        return MachineEnd(
            exit_status=status,
            output=self._process.output_tail(),
            reason=self._monitor.shutdown_reason,
            command_line=self.command_line,
        )

    def booted(self) -> None:
        self._monitor.execute("set-action", {"reboot": "reset"})

    def pause(self) -> None:
        self._monitor.execute("stop")

    def resume(self) -> None:
        self._monitor.execute("cont")

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
        answer = self._monitor.human(
            f"hostfwd_add net0 tcp:127.0.0.1:{host_port}-{GUEST_ADDRESS}:{guest_port}"
        ).strip()
        if answer:
            raise SmolVMError(
                f"port {host_port} of 127.0.0.1 cannot be forwarded to port {guest_port} of the "
                f"guest: it is in use, or not allowed; give another host_port, or None for any "
                f"free one (QEMU: {answer})",
                {"host_port": host_port, "guest_port": guest_port},
            )
        new = set(self._host_forwards()) - set(before)
        port = next(host for host, guest in new if guest == guest_port)
        self._forwards[port] = guest_port
        return port

    def unforward(self, host_port: int) -> None:
        if host_port not in self._forwards:
            raise SmolVMError(
                f"port {host_port} of 127.0.0.1 is not forwarded to this VM: the forwarded ones "
                f"are {sorted(self._forwards) or 'none'}",
                {"host_port": host_port, "forwarded": sorted(self._forwards)},
            )
        self._monitor.human(f"hostfwd_remove net0 tcp:127.0.0.1:{host_port}")
        del self._forwards[host_port]

    def _host_ports(self) -> dict[int, int]:
        return {guest: host for host, guest in self._host_forwards()}

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
        self._process.kill()
        self._monitor.close()
