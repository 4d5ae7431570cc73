"""The Firecracker backend: one process per machine, worked through its API.

The process runs in the VM's directory and is given names in it, not paths: what it saves can then
be loaded in another directory. The way into the guest is vsock, which takes no rights on this host.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from pytest_smolvm.backends import firecracker_api as api
from pytest_smolvm.backends import kernel_args, vsock
from pytest_smolvm.backends.base import MachineEnd, MachineSpec
from pytest_smolvm.backends.firecracker_process import TAP, VSOCK, FirecrackerProcess
from pytest_smolvm.backends.forwarded import check_forwarded
from pytest_smolvm.backends.versions import version_of
from pytest_smolvm.disks import ImageFormat
from pytest_smolvm.errors import BackendError, OperationTimeoutError
from pytest_smolvm.images.guestfiles import WITHOUT_PCI
from pytest_smolvm.process import Deadline, ToolError, find_tool, run_tool

_DISK = "root"
_CARD = "eth0"
_MAC_ADDRESS = "52:54:00:12:34:56"
"""Each guest is alone on its network."""
_CONSOLE = "ttyS0"  # on aarch64, too
_HOLES_TIMEOUT_S = 60.0


class FirecrackerBackend:
    """Runs machines with Firecracker, on KVM."""

    name = "firecracker"
    accelerator = "kvm"
    can_restore = True
    disk_format: ImageFormat = "raw"
    saves_memory_apart = True

    def __init__(self, binary: str, architecture: str) -> None:
        self.binary = binary
        self.architecture = architecture
        self.reasons: tuple[str, ...] = (f"{binary}, on a KVM that ran a guest",)

    def version(self) -> str:
        return version_of(self.binary, r"v(\d[\w.-]*)")

    def launch(self, spec: MachineSpec, deadline: Deadline) -> FirecrackerMachine:
        """Start Firecracker and have it start the machine, which boots on while this returns."""
        if problem := kernel_args.firecracker_problem(spec.kernel, self.architecture):
            raise BackendError(problem, {"kernel": str(spec.kernel)})
        machine = FirecrackerMachine(self.binary, self.architecture, spec)
        try:
            machine.start(deadline)
        except BaseException:
            machine.kill()
            raise
        return machine

    def describe(self, spec: MachineSpec) -> list[str]:
        """Firecracker's version, and what it is asked for that is not a name of this VM's."""
        requests = [
            api.MachineConfiguration(vcpu_count=spec.vcpu_count, mem_size_mib=spec.mem_size_mib),
            api.Drive(drive_id=_DISK, path_on_host="disk", is_read_only=spec.disk.read_only),
        ]
        return [
            *(self.name, self.version(), self.accelerator, spec.network),
            _command_line(spec, host_name="vm"),
            *(request.model_dump_json() for request in requests),
        ]


def _command_line(spec: MachineSpec, host_name: str) -> str:
    settled = kernel_args.kernel_command_line(
        spec.boot_args,
        console=_CONSOLE,
        read_only=spec.disk.read_only,
        replaced={},
    )
    return kernel_args.with_host_name(f"{settled} {WITHOUT_PCI}", host_name)


class FirecrackerMachine:
    """One machine: a Firecracker process, and the next one after a reset."""

    def __init__(self, binary: str, architecture: str, spec: MachineSpec) -> None:
        self._binary = binary
        self._architecture = architecture
        self._spec = spec
        self._folder = os.open(spec.directory, os.O_RDONLY | os.O_DIRECTORY)
        self._vsock_path = f"/proc/self/fd/{self._folder}/{VSOCK}"
        self._process = FirecrackerProcess(binary, spec, self._folder)
        self._forwards = vsock.Forwards(self._vsock_path)
        self._ssh_port = 0
        self._port: socket.socket | None = None
        self._resets = 0
        self._resetting = False
        self._killed = False
        self._guard = threading.RLock()

    def start(self, deadline: Deadline) -> None:
        """Start the process, and the machine as its specification says."""
        if self._spec.state is None:
            self._boot(deadline)
        else:
            self._load(self._spec.state, deadline)
        self._ssh_port = self._forwards.open(22, 0)

    # -- starting -------------------------------------------------------------

    def _boot(self, deadline: Deadline) -> None:
        spec = self._spec
        with self._process.starting("could not start the machine", deadline) as ask:
            ask.put(
                "/machine-config",
                api.MachineConfiguration(
                    vcpu_count=spec.vcpu_count, mem_size_mib=spec.mem_size_mib
                ),
            )
            ask.put(
                "/boot-source",
                api.BootSource(
                    kernel_image_path=self._process.room.bring(spec.kernel),
                    initrd_path=self._process.room.bring(spec.initrd) if spec.initrd else None,
                    boot_args=_command_line(spec, spec.vm_id),
                ),
            )
            ask.put(
                f"/drives/{_DISK}",
                api.Drive(
                    drive_id=_DISK,
                    path_on_host=self._bring_disk(),
                    is_read_only=spec.disk.read_only,
                ),
            )
            if spec.network == "nat":
                ask.put(
                    f"/network-interfaces/{_CARD}",
                    api.NetworkInterface(iface_id=_CARD, host_dev_name=TAP, guest_mac=_MAC_ADDRESS),
                )
            ask.put("/entropy", api.EntropyDevice())
            ask.put("/vsock", api.Vsock(guest_cid=vsock.GUEST_CID, uds_path=VSOCK))
            ask.put("/actions", api.Action(action_type="InstanceStart"))

    def _load(self, state: Path, deadline: Deadline) -> None:
        memory = self._spec.memory
        assert memory is not None  # noqa: S101 - saved beside the state
        with self._process.starting("could not load a saved state", deadline) as ask:
            # "x86_64 only": the specification.
            corrects = (
                self._process.release >= api.CLOCK_REALTIME_SINCE and self._architecture == "x86_64"
            )
            self._bring_disk()
            memory_file = self._process.room.bring(memory.path)
            ask.put(
                "/snapshot/load",
                api.SnapshotLoad(
                    snapshot_path=self._process.room.bring(state),
                    mem_backend=api.MemoryBackend(backend_path=memory_file),
                    clock_realtime=True if corrects else None,
                ),
                timeout_s=max(0.1, deadline.remaining_s()),
            )

    def _bring_disk(self) -> str:
        disk = self._spec.disk
        return self._process.room.bring(disk.image.path, writable=not disk.read_only)

    # -- the process ----------------------------------------------------------

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def command_line(self) -> list[str]:
        return self._process.command_line

    @property
    def ssh_address(self) -> tuple[str, int]:
        return "127.0.0.1", self._ssh_port

    def poll(self) -> MachineEnd | None:
        return None if self._resetting else self._process.ended(0)

    def wait(self, timeout_s: float) -> MachineEnd | None:
        return self._process.ended(timeout_s)

    @property
    def has_given_sign(self) -> bool:
        return self._process.has_given_sign

    def flush_console(self) -> None:
        self._process.flush_console()

    def booted(self) -> None:
        """Nothing: a guest that resets ends the machine, before and after."""

    @property
    def stalled(self) -> str:
        return ""  # a failed write is the guest's to hear of

    def when_stalled(self, notify: Callable[[], object]) -> None:
        """Never."""

    # -- the machine ----------------------------------------------------------

    def pause(self) -> None:
        self._process.client.patch("/vm", api.VmState(state="Paused"))

    def resume(self) -> None:
        self._process.client.patch("/vm", api.VmState(state="Resumed"))

    def resume_with(self, message: bytes, deadline: Deadline) -> None:
        # Saving it has ended its connections, and nothing is heard by one that stands still.
        self.resume()
        port = self.open_port(deadline)
        port.settimeout(max(0.01, deadline.remaining_s()))
        try:
            port.sendall(message)
        finally:
            port.settimeout(None)

    def open_port(self, deadline: Deadline) -> socket.socket:
        self._close_port()
        self._port = vsock.connect(self._vsock_path, vsock.AGENT_PORT, deadline, self._check_runs)
        return self._port

    @property
    def port(self) -> socket.socket:
        if self._port is None:
            raise BackendError("the guest's agent was not spoken to yet")
        return self._port

    def _check_runs(self) -> None:
        end = self.poll()
        if end is not None:
            raise BackendError(
                f"the machine ended with exit status {end.exit_status}: {end.output}",
                exit_status=end.exit_status,
                command_line=end.command_line,
            )

    def save(self, state: Path, deadline: Deadline, memory: Path | None = None) -> None:
        assert memory is not None  # noqa: S101 - saves_memory_apart
        room = self._process.room
        names = {room.name_for(target): target for target in (state, memory)}
        state_name, memory_name = names
        self._process.client.put(
            "/snapshot/create",
            api.SnapshotCreate(snapshot_path=state_name, mem_file_path=memory_name),
            timeout_s=max(0.1, deadline.remaining_s()),
        )
        for name, target in names.items():
            room.fetch(name, target)
        # All of the memory was written, also what the guest never used.
        with contextlib.suppress(ToolError):
            fallocate = find_tool("fallocate", "util-linux")
            run_tool([fallocate, "--dig-holes", str(memory)], timeout_s=_HOLES_TIMEOUT_S)

    @property
    def power_off_program(self) -> str:
        # There is nothing that could switch it off on x86; it ends where others reset.
        return "reboot" if self._architecture == "x86_64" else "poweroff"

    def press_power_button(self) -> None:
        self._process.client.put("/actions", api.Action(action_type="SendCtrlAltDel"))

    def reset(self) -> None:
        with self._guard:
            self._resetting = True
            self._process.stop()

    @property
    def resets(self) -> int:
        return self._resets

    def wait_for_reset(self, since: int, deadline: Deadline) -> bool:
        """A guest that reboots ends the process: another one boots from its disk then."""
        with self._guard:
            if self._resets > since:
                return True
            if self._process.ended(deadline.remaining_s()) is None or self._killed:
                self._resetting = False
                return False
            self._resetting = True
            try:
                self._process.end()
                self._process = FirecrackerProcess(self._binary, self._spec, self._folder)
                self._boot(deadline)
                self._resets += 1
            finally:
                self._resetting = False
            return True

    def forward(self, guest_port: int, host_port: int) -> int:
        return self._forwards.open(guest_port, host_port)

    @property
    def forwards(self) -> dict[int, int]:
        ports = self._forwards.guest_ports
        return {host: guest for host, guest in ports.items() if host != self._ssh_port}

    def unforward(self, host_port: int) -> None:
        check_forwarded(host_port, self.forwards)
        self._forwards.close(host_port)

    def quit(self, timeout_s: float) -> None:
        # What the guest has written is in its disk's file, or on its way: not once it is paused.
        with contextlib.suppress(BackendError, OperationTimeoutError):
            self._process.client.patch("/vm", api.VmState(state="Paused"), timeout_s=timeout_s)
        self._process.stop()

    def kill(self) -> None:
        self._killed = True
        with contextlib.ExitStack() as all_of_it:
            all_of_it.callback(self._close_folder)
            all_of_it.callback(self._close_port)
            all_of_it.callback(self._forwards.close_all)
            all_of_it.callback(self._process.end)

    def _close_port(self) -> None:
        if self._port is not None:
            self._port.close()
            self._port = None

    def _close_folder(self) -> None:
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1
