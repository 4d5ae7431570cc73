"""What a backend is: it starts one machine, and works it. It knows no tests and no SSH."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pytest_smolvm.config import Network
from pytest_smolvm.disks import Disk, ImageFormat
from pytest_smolvm.process import Deadline

PORT_NAME = "org.smolvm.port"
"""How the guest finds the virtio-serial port on which the host talks to its agent; a guest that
has no such port, but /dev/vsock, has its agent listen there."""


@dataclass(frozen=True)
class MemoryFile:
    """A file with the contents of a guest's memory."""

    path: Path
    shared: bool
    """Whether the machine writes to it, or to a copy-on-write mapping of its own."""


@dataclass(frozen=True)
class MachineSpec:
    """One machine to start, all questions answered."""

    vm_id: str
    directory: Path
    """Where the machine may keep files of its own; 0700."""
    kernel: Path
    initrd: Path | None
    boot_args: str
    """What kind of boot is asked for; see ``VMConfig.boot_args``."""
    vcpu_count: int
    mem_size_mib: int
    disk: Disk
    network: Network
    accelerator: str
    """Which accelerator was seen to run a guest here."""
    console: Path
    """The file that takes what the guest writes to its console."""
    machine_log: Path
    """The file that takes what the emulator itself prints."""
    console_sign: bytes = b""
    """What to look for on the console; see ``Machine.has_given_sign``."""
    memory: MemoryFile | None = None
    """None: memory of its own, empty at the start."""
    state: Path | None = None
    """What ``Machine.save`` wrote: the machine starts from there, paused. None: it boots.

    With a shared memory file, which is empty at first, the state is to hold the memory, too;
    with one that is not, it is not.
    """


@dataclass(frozen=True)
class MachineEnd:
    """How a machine ended. ``exit_status`` is negative for a signal's number."""

    exit_status: int
    output: str
    """The last of what the emulator printed."""
    reason: str = ""
    """Why the guest stopped, in the backend's words; empty: it did not say."""
    command_line: list[str] = field(default_factory=list)
    emulator: str = "QEMU"
    """What ended, for people."""

    @property
    def by_guest(self) -> bool:
        """Whether the guest switched itself off, as asked."""
        return self.exit_status == 0 and self.reason == "guest-shutdown"


class Machine(Protocol):
    """A machine that was started."""

    @property
    def pid(self) -> int: ...

    @property
    def command_line(self) -> list[str]: ...

    @property
    def ssh_address(self) -> tuple[str, int]:
        """Where the guest's port 22 is reached from this host."""
        ...

    def poll(self) -> MachineEnd | None:
        """How it ended, or None while it runs. Never waits."""
        ...

    @property
    def has_given_sign(self) -> bool:
        """Whether ``console_sign`` came on the console since the start, or the last reset."""
        ...

    def flush_console(self) -> None:
        """Have what the guest has written to its console so far in its file."""
        ...

    def wait(self, timeout_s: float) -> MachineEnd | None:
        """Like ``poll``, after waiting for its end for at most ``timeout_s`` seconds."""
        ...

    def booted(self) -> None:
        """The guest answers: from now on its reboots are its own business.

        Until then a guest that resets (a panic, mostly) ends the machine; one that starts from
        a saved state has booted.
        """
        ...

    @property
    def stalled(self) -> str:
        """Why it stands still although nobody paused it: its disk could not be written, say.

        Empty: it does not. ``resume`` lets it try again.
        """
        ...

    def when_stalled(self, notify: Callable[[], object]) -> None:
        """Have ``notify`` called, in a thread of its own, when that happens."""
        ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def resume_with(self, message: bytes, deadline: Deadline) -> None:
        """Resume a machine whose agent waits, and have that hear ``message`` on its port."""
        ...

    def open_port(self, deadline: Deadline) -> socket.socket:
        """Our end of a channel to the guest's agent, which runs; ``port`` from now on."""
        ...

    @property
    def port(self) -> socket.socket:
        """Our end of the channel to the guest's agent: of the one that was opened last."""
        ...

    def save(self, state: Path, deadline: Deadline, memory: Path | None = None) -> None:
        """Write a paused machine's state into a file; it stays paused, and can be resumed.

        ``memory``: the file for what the guest's memory holds, if the backend
        ``saves_memory_apart``; else that is in the state, but for a memory file that is shared:
        it has its part already. When this returns, what the guest wrote is in its disk's file.
        """
        ...

    @property
    def power_off_program(self) -> str:
        """What a guest runs to switch this machine off."""
        ...

    def press_power_button(self) -> None:
        """Ask the guest to switch itself off; it may ignore that."""
        ...

    def reset(self) -> None:
        """Like the reset button: nothing in the guest is asked."""
        ...

    def wait_for_reset(self, since: int, deadline: Deadline) -> bool:
        """Whether the machine was reset more than ``since`` times before the deadline.

        To be called once the guest was asked to reboot: a machine that ends then starts again.
        """
        ...

    @property
    def resets(self) -> int:
        """How many times the machine was reset, by the guest or from here."""
        ...

    def forward(self, guest_port: int, host_port: int) -> int:
        """Let 127.0.0.1:``host_port`` (0: any) lead to the guest's port; returns the port."""
        ...

    def unforward(self, host_port: int) -> None: ...

    @property
    def forwards(self) -> dict[int, int]:
        """The guest's ports that ``forward`` made reachable, by the host's."""
        ...

    def quit(self, timeout_s: float) -> None:
        """End it without asking the guest, once what that wrote is in the disk's file.

        One that has not ended within ``timeout_s`` seconds runs on.
        """
        ...

    def kill(self) -> None:
        """End it now. The guest loses what it had not written to its disk."""
        ...


class Backend(Protocol):
    """A way to run machines on this host."""

    name: str
    accelerator: str
    reasons: tuple[str, ...]
    """Why it is this one, or not on a quicker accelerator, for people; empty: it goes without
    saying."""

    can_restore: bool
    """Whether its machines can be saved, and started from what was saved."""

    disk_format: ImageFormat
    """What a disk that its machine may write to is made as."""

    saves_memory_apart: bool
    """Whether ``Machine.save`` writes what the memory holds into a file of its own, from which
    others can start; else that takes one more machine: see ``snapshots``."""

    def version(self) -> str:
        """The emulator's version, such as ``7.2.22``; empty: it cannot be had."""
        ...

    def launch(self, spec: MachineSpec, deadline: Deadline) -> Machine:
        """Start a machine; it boots on while this returns. Raises ``BackendError``."""
        ...

    def describe(self, spec: MachineSpec) -> list[str]:
        """All that a saved state depends on, but for the contents of files: equal lists mean
        that one machine can start from what another has saved."""
        ...
