"""A backend behind the Protocol that boots nothing: for tests of what the plugin decides.

``install()`` replaces the choice of a backend and the login; all the rest (the
VM's directory and lock, its record, retention) is the real thing. A guest is a
process that sleeps; commands in it do what their names say:

* ``true``, ``sync``: succeed. ``fail``: exit status 1. ``echo WORDS``: prints them.
* ``poweroff``: the machine ends as a guest that switches itself off.
* ``crash``: the machine dies.
* ``hang``: blocks until the process gets a signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pytest_smolvm import CommandResult, SmolVMError, access, vm
from pytest_smolvm import guest as guests
from pytest_smolvm.backends.base import MachineEnd, MachineSpec
from pytest_smolvm.errors import BackendError
from pytest_smolvm.inventory import inventory
from pytest_smolvm.process import Deadline, MachineProcess
from pytest_smolvm.ssh import Login
from pytest_smolvm.store import shared_store

_machines: dict[tuple[str, int], FakeMachine] = {}


class FakeMachine:
    """A process that sleeps, in the place of an emulator."""

    def __init__(self, spec: MachineSpec) -> None:
        self._process = MachineProcess(
            ["sleep", "3600"], cwd=spec.directory, log=spec.machine_log, pass_fds=[]
        )
        self._by_guest = False
        self.paused = False
        self.resets = 0
        self.stalled = ""
        self.disk = spec.disk.image.path
        _machines[self.ssh_address] = self

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def command_line(self) -> list[str]:
        return self._process.argv

    @property
    def ssh_address(self) -> tuple[str, int]:
        return "127.0.0.1", self.pid

    def when_stalled(self, notify: Callable[[], object]) -> None:
        """It never does."""

    has_given_sign = True
    power_off_program = "poweroff"

    def flush_console(self) -> None:
        """There is nothing."""

    def end_by_guest(self) -> None:
        self._by_guest = True
        self._process.kill()

    def crash(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait(5)

    def poll(self) -> MachineEnd | None:
        return self.wait(0) if self._process.poll() is not None else None

    def wait(self, timeout_s: float) -> MachineEnd | None:
        status = self._process.wait(timeout_s)
        if status is None:
            return None
        if self._by_guest:
            return MachineEnd(0, "", "guest-shutdown", self.command_line)
        return MachineEnd(status, "", "", self.command_line)

    def booted(self) -> None: ...

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def press_power_button(self) -> None:
        self.end_by_guest()

    def reset(self) -> None:
        self.resets += 1

    def wait_for_reset(self, since: int, deadline: Deadline) -> bool:
        return self.resets > since

    def forward(self, guest_port: int, host_port: int) -> int:
        return host_port or guest_port

    def unforward(self, host_port: int) -> None: ...

    def quit(self, timeout_s: float) -> None:
        self._process.kill()

    def kill(self) -> None:
        self._process.kill()


class FakeBackend:
    """Starts a process for each machine; ``no-boot`` in the boot arguments makes one that dies."""

    name = "fake"
    accelerator = "none"
    reasons = ("not kvm: it is a fake",)
    can_restore = False
    disk_format = "qcow2"
    saves_memory_apart = False

    def version(self) -> str:
        return "1.0"

    def launch(self, spec: MachineSpec, deadline: Deadline) -> FakeMachine:
        spec.console.write_text(f"console of {spec.vm_id}\n")
        delay_s = float(os.environ.get("FAKE_BOOT_S", "0"))
        if delay_s:
            time.sleep(delay_s)
        if "not-even-started" in spec.boot_args:
            raise BackendError("the fake could not be started")
        if log := os.environ.get("FAKE_BOOT_LOG"):
            with Path(log).open("a") as file:
                file.write(f"{spec.vm_id}\n")
        machine = FakeMachine(spec)
        if "no-boot" in spec.boot_args:
            machine.crash()
        return machine


class FakeConnections:
    """What ``Guest`` talks through."""

    def __init__(
        self,
        address: tuple[str, int],
        login: Login,
        check_usable: Callable[[], None],
        is_up: Callable[[], bool],
    ) -> None:
        self.machine = _machines.get(address)
        self._check_usable = check_usable

    def open(self, deadline: Deadline, *, is_up: bool = False) -> float:
        self._check_usable()
        return time.monotonic()

    def close(self) -> None: ...

    @contextlib.contextmanager
    def lend(self, timeout_s: float) -> Iterator[FakeConnections]:
        self._check_usable()
        yield self


def _run(
    connections: FakeConnections, command: str | Sequence[str], timeout_s: float, **_options: Any
) -> CommandResult:
    line = command if isinstance(command, str) else " ".join(command)
    machine = connections.machine
    assert machine is not None
    word, _, rest = line.partition(" ")
    if word == "poweroff":
        machine.end_by_guest()
    elif word == "crash":
        machine.crash()
    elif word == "deaf":
        raise SmolVMError("the guest does not answer")
    elif word == "hang":
        Path(rest).touch()
        signal.pause()
    output = f"{rest}\n" if word == "echo" else ""
    return CommandResult(int(word == "fail"), output, "", 0.01, line)


def install() -> None:
    """From now on, this process boots fakes."""
    vm.choose = lambda *_arguments: FakeBackend()
    access.prepare_login = lambda *_arguments: Login("root", "ssh-ed25519 AAAA", ())
    guests.Connections = FakeConnections  # type: ignore[assignment,misc]
    guests.commands.run = _run  # type: ignore[assignment]
    with contextlib.suppress(ImportError):
        from pytest_smolvm.plugin import header

        header.choose = lambda *_arguments: FakeBackend()


def live_vms() -> list[str]:
    """The VMs whose machines run."""
    return [
        entry.vm_id
        for entry in inventory(shared_store())
        if entry.live and Path(f"/proc/{entry.record.machine_pid}").exists()
    ]
