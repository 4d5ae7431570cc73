"""What a VM's owner can do to it from outside: pause it, open ports of it, look at it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

from pytest_smolvm import access, diagnosis
from pytest_smolvm.backends.base import Backend, Machine
from pytest_smolvm.config import VMConfig
from pytest_smolvm.images.manifest import read_manifest
from pytest_smolvm.inside import check_port
from pytest_smolvm.journal import Entry, Journal
from pytest_smolvm.keys import key_pair_for
from pytest_smolvm.records import VMState
from pytest_smolvm.store import Store


class Outside(ABC):
    """The half of ``SmolVM`` that asks nothing of the guest."""

    _config: VMConfig
    _store: Store
    _state: VMState
    _backend: Backend | None
    _machine: Machine | None
    _journal: Journal
    _ssh_user: str
    _ssh_key_path: Path | None
    _host_key: str
    _last_console: str
    _deleted: bool
    _timings: dict[str, float]
    _guard: threading.RLock

    @abstractmethod
    def _live_machine(self, what: str) -> Machine:
        """The machine, or an error that says why one cannot ``what``."""

    @abstractmethod
    def _check_usable(self, grace_s: float) -> None:
        """Raise unless the machine runs; a dying one gets ``grace_s`` to be seen dead."""

    @abstractmethod
    def _ssh_address(self) -> tuple[str, int]:
        """Where the guest's SSH server is reached."""

    @abstractmethod
    def _write_record(self) -> None:
        """Let other processes know how things stand."""

    def pause(self) -> Self:
        """Freeze the virtual CPUs; time stands still in the guest."""
        with self._guard:
            self._live_machine("pause it").pause()
            self._state = VMState.PAUSED
            self._write_record()
            return self

    def resume(self) -> Self:
        """Let a paused VM go on."""
        with self._guard:
            self._live_machine("resume it").resume()
            self._state = VMState.RUNNING
            self._write_record()
            return self

    def expose_local(self, guest_port: int, host_port: int | None = None) -> int:
        """Make the guest's TCP port reachable on 127.0.0.1; returns the port there.

        ``host_port``: exactly that one, or an error; None: any free one.
        """
        check_port(guest_port, "guest_port")
        if host_port is not None:
            check_port(host_port, "host_port")
        with self._guard:
            return self._live_machine("expose a port of it").forward(guest_port, host_port or 0)

    def unexpose_local(self, host_port: int) -> None:
        """Take back what ``expose_local`` gave."""
        with self._guard:
            self._live_machine("take back a port of it").unforward(host_port)

    def ssh_commands(self) -> dict[str, str]:
        """Lines to paste into a terminal: ``ssh``, ``copy_to_guest``, ``copy_from_guest``."""
        access.check_offers_ssh(self._config)
        self._check_usable(0)
        manifest = read_manifest(self._config.rootfs_path)
        authorized = manifest.authorized_keys if manifest else []
        key = self._ssh_key_path or key_pair_for(self._store, authorized).private_path
        return access.paste_lines(
            vm_id=self.vm_id,
            directory=self.directory,
            address=self._ssh_address(),
            user=self._ssh_user,
            host_key=self._host_key,
            key_path=key,
        )

    @property
    def vm_id(self) -> str:
        """The id, unique among the VMs of this host."""
        return self._config.vm_id

    @property
    def config(self) -> VMConfig:
        """The configuration, with the constructor's overrides."""
        return self._config

    @property
    def directory(self) -> Path:
        """Where its files lie on this host, for as long as it is not deleted."""
        return self._store.vms / self.vm_id

    @property
    def state_dir(self) -> Path:
        """The state directory that it belongs to."""
        return self._store.root

    @property
    def deleted(self) -> bool:
        """Whether its life is over: ``delete()`` or ``retain()`` ended it."""
        return self._deleted

    @property
    def backend_name(self) -> str:
        """The backend that runs it, such as ``qemu``; empty before the first start."""
        return self._backend.name if self._backend is not None else ""

    @property
    def accelerator(self) -> str:
        """What the backend runs it with, such as ``kvm`` or ``tcg``; empty before that."""
        return self._backend.accelerator if self._backend is not None else ""

    @property
    def status(self) -> VMState:
        """Where the VM is in its life; a machine that ended by itself is seen here."""
        if self._machine is not None and self._state in (VMState.RUNNING, VMState.PAUSED):
            end = self._machine.poll()
            if end is not None:
                self._state = VMState.STOPPED if end.by_guest else VMState.ERROR
            elif self._machine.stalled:
                self._state = VMState.PAUSED
        return self._state

    @property
    def is_running(self) -> bool:
        """Whether its machine runs now, and is not paused."""
        return self.status is VMState.RUNNING

    @property
    def console(self) -> str:
        """What the guest has written to its console so far, as it came."""
        if self._machine is not None:
            self._machine.flush_console()
        text = diagnosis.read_console(self.directory / "console.log")
        return text or self._last_console

    @property
    def commands(self) -> list[Entry]:
        """The last commands that were run in it through this object, the oldest first."""
        return self._journal.entries

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of each phase of the last start: disk, launch, boot or restore, ssh.

        ``prepare`` and ``template`` are there if this VM did the one, or made the other.
        """
        return dict(self._timings)

    def __repr__(self) -> str:
        return f"<SmolVM {self.vm_id} {self.status}>"
