"""SmolVM: the life of one virtual machine, from create to delete."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from pytest_smolvm import access, booting, diagnosis, power, registry
from pytest_smolvm.backends import choose
from pytest_smolvm.backends.base import Backend, Machine, MachineSpec
from pytest_smolvm.config import SSH_BOOT_ARGS, VMConfig, generate_vm_id
from pytest_smolvm.disks import fingerprint_of_image
from pytest_smolvm.errors import (
    ImageError,
    SmolVMError,
    VMNotFoundError,
)
from pytest_smolvm.fitting import not_on_firecracker
from pytest_smolvm.guest import Guest
from pytest_smolvm.images.builder import DistributionBuilder
from pytest_smolvm.images.kernel import kernel_architecture
from pytest_smolvm.inside import Inside
from pytest_smolvm.journal import Journal
from pytest_smolvm.outside import Outside
from pytest_smolvm.paths import expanded
from pytest_smolvm.process import Deadline
from pytest_smolvm.records import Retained, Usage, VMRecord, VMState, new_record, read_record
from pytest_smolvm.startup import Preparation, Startup
from pytest_smolvm.store import Store, VMDirectory, shared_store
from pytest_smolvm.templates import Template
from pytest_smolvm.vmdisk import keeps_its_disk, stat_image

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 20.0


class SmolVM(Startup, Inside, Outside):
    """One virtual machine with a disk of its own.

    ``config``: what the machine is; None: the image ``micro`` with the defaults.
    ``vm_id``, ``backend`` and ``mem_size_mib`` override the configuration's.
    ``ssh_key_path``: the private key to log in with; None: the library's own, or
    whichever of yours the image accepts. ``accelerator``: ``"kvm"``, ``"hvf"``,
    ``"tcg"``, or ``"auto"``: the quickest that really runs a guest here.
    ``restore``: whether it may start from a template, a guest of the same configuration that
    was saved after its boot; False: it boots.

    In a ``with`` statement the VM starts on entry (if it has not) and is deleted on exit. A VM
    ends with the process that made it, however that ends.

    Raises ``VMAlreadyExistsError`` when a live VM has the id already.
    """

    def __init__(
        self,
        config: VMConfig | None = None,
        *,
        vm_id: str | None = None,
        backend: str | None = None,
        mem_size_mib: int | None = None,
        ssh_user: str = "root",
        ssh_key_path: Path | str | None = None,
        accelerator: str = "auto",
        restore: bool = True,
    ) -> None:
        overrides = {"vm_id": vm_id, "backend": backend, "mem_size_mib": mem_size_mib}
        key_path = expanded(ssh_key_path) if ssh_key_path else None
        self._prepare(_settle_config(config, overrides), shared_store(), ssh_user, key_path)
        self._wanted_accelerator = accelerator
        self._restore = restore
        self._claim()

    def _prepare(
        self, config: VMConfig, store: Store, ssh_user: str, ssh_key_path: Path | None
    ) -> None:
        self._config = config
        self._store = store
        self._ssh_user = ssh_user
        self._ssh_key_path = ssh_key_path
        self._state = VMState.CREATED
        self._backend: Backend | None = None
        self._machine: Machine | None = None
        self._guest: Guest | None = None
        self._host_key = ""
        self._last_console = ""
        self._during = "on its own"
        self._deleted = False
        self._timings: dict[str, float] = {}
        self._guard = threading.RLock()
        self._directory: VMDirectory | None = None
        self._wanted_accelerator = "auto"
        self._journal = Journal(store.vms / config.vm_id)
        self._usage = Usage()
        self._retained: Retained | None = None
        self._restore = True
        self._template: Template | None = None
        self._spec: MachineSpec | None = None
        self._layers: list[str] = []
        self._troubles: list[str] = []
        self._templates_made = 0
        self._preparing = False
        self._aborted = False

    @classmethod
    def from_id(cls, vm_id: str) -> SmolVM:
        """The VM of that id: this process's own, another's, or one that was kept.

        A VM of another process can be worked in (``run``, files), while its life
        stays its owner's business. A kept one comes back as a VM in the state
        ``created`` that continues from its disk, and whose ``delete()`` keeps that
        again. ``VMNotFoundError`` if there is none.
        """
        own = registry.find(vm_id)
        if own is not None:
            return own
        store = shared_store()
        path = store.find(vm_id)
        record = read_record(path)
        if record is None:
            raise VMNotFoundError(
                f"the VM {vm_id!r} is being made right now, or its record cannot be read: {path}",
                {"vm_id": vm_id},
            )
        if store.is_owned(vm_id):
            from pytest_smolvm.joined import JoinedVM  # which is a SmolVM

            return JoinedVM(store, record)
        key_path = Path(record.ssh_key_path) if record.ssh_key_path else None
        try:
            config = VMConfig.model_validate(record.config)
        except ValidationError as error:
            raise SmolVMError(
                f"the VM {vm_id!r} cannot be booted again:\n{error}", {"vm_id": vm_id}
            ) from None
        vm = cls.__new__(cls)
        vm._prepare(config, store, record.ssh_user, key_path)
        vm._usage, vm._retained = record.usage, record.retained
        vm._claim()
        return vm

    # -- life ---------------------------------------------------------------

    def __enter__(self) -> Self:
        return self if self.status in (VMState.RUNNING, VMState.PAUSED) else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.delete()

    def start(
        self,
        boot_timeout: float | None = None,
        *,
        keep_failed: bool = False,
        preparation: Preparation | None = None,
    ) -> Self:
        """Get the machine to run, and wait until the guest lets us in.

        The first VM of a configuration boots, and a template is made of it; later ones are
        restored from that (see ``restore``). One whose boot arguments offer no SSH is not
        waited for.

        ``boot_timeout`` is seconds for all of it; None: 60, or 180 where the
        guest is emulated. Raises ``BackendError`` when the machine dies or
        nothing here can run it, ``OperationTimeoutError`` past the timeout; the
        machine is gone then, and so is its directory, but for a kept disk.
        ``keep_failed``: the directory stays then, until ``retain()`` or ``delete()``.
        ``preparation``: what is to have been done in it, by this VM or by one before it.
        """
        with self._guard:
            self._require_owner("start it")
            if self._machine is not None and self._machine.poll() is None:
                raise SmolVMError(f"the VM {self.vm_id!r} is already {self.status}")
            self._check_not_deleted()
            self._end_machine()
            try:
                self._boot(boot_timeout, preparation)
            except BaseException:
                # One that ran, but could not be prepared, is there to be looked at.
                if not (keep_failed and self._preparing):
                    self._give_up(keep=keep_failed)
                raise
            return self

    def _boot(self, boot_timeout: float | None, preparation: Preparation | None) -> None:
        self._claim()
        if self._retained is not None and self._retained.without_disk:
            raise ImageError(
                f"the VM {self.vm_id!r} was kept without its disk: "
                f"{self._retained.without_disk}. What is left of it lies in {self.directory}",
                {"vm_id": self.vm_id},
            )
        self._start_up(self._choose(), boot_timeout, preparation)

    @classmethod
    def from_template(cls, template: Template, *, vm_id: str | None = None) -> SmolVM:
        """A new VM that starts where ``template`` was made: ``start()`` restores it.

        Memory, processes and disk are as they were; clock, random numbers, host name and ids
        are its own. ``vm_id``: None generates one.
        """
        fields = {"vm_id": vm_id or generate_vm_id(), "retain_disk_on_delete": False}
        facts = template.facts
        vm = cls(
            template.config.model_copy(update=fields),
            ssh_user=facts.ssh_user,
            ssh_key_path=facts.ssh_key_path,
            accelerator=facts.accelerator,
        )
        vm._template = template
        return vm

    def stop(self, timeout: float = STOP_TIMEOUT_S) -> Self:
        """Switch the guest off: asked first, then, after ``timeout`` seconds, by force.

        Its disk stays until ``delete()``; ``start()`` boots it again.
        """
        with self._guard:
            self._require_owner("stop it")
            deadline = Deadline(timeout)
            machine = self._machine
            if machine is None:
                return self
            try:
                if machine.poll() is None:
                    if self._state is VMState.PAUSED or machine.stalled:
                        machine.resume()
                        self._state = VMState.RUNNING
                    power.power_off(self.vm_id, machine, self._guest, deadline)
            finally:
                self._end_machine()
                self._state = VMState.STOPPED
            self._write_record()
            return self

    def delete(self) -> None:
        """End the VM and remove all that it has on this host, but for what is to be kept.

        With ``retain_disk_on_delete`` the guest is switched off properly first,
        so that its disk holds what it had written; a VM that was kept before, and
        opened again by ``from_id``, is kept again. Deleting twice is no error; a
        VM that cannot be removed is one.
        """
        with self._guard:
            self._require_owner("delete it")
            if not self._deleted:
                self._end(self._retained)

    def retain(self, reason: str = "somebody asked for it") -> Path:
        """End the VM but keep its directory, to be looked at; returns the directory.

        There lie its configuration, disk, console and the commands that were run,
        beside a ``README.txt``; ``SmolVM.from_id`` boots it again. The guest is asked
        to write its disk and then ended, within seconds. ``reason`` is for people;
        that of a VM that was kept before stands.
        """
        with self._guard:
            self._require_owner("keep it")
            self._check_not_deleted()
            if self._directory is None:
                raise SmolVMError(f"the VM {self.vm_id!r} has nothing to keep: it never started")
            kept = self._directory.path
            self._end(self._retained or Retained(reason=reason, at=time.time()))
            return kept

    def _end(self, retained: Retained | None) -> None:
        switch_off = keeps_its_disk(self._config)
        try:
            if switch_off:
                self.stop()
            elif retained and self._machine is not None and self._machine.poll() is None:
                if self._state is VMState.PAUSED:
                    self._machine.resume()
                    self._state = VMState.RUNNING
                power.settle(self.vm_id, self._machine, self._guest)
        finally:
            self._end_machine()
            if self._state is not VMState.ERROR:
                self._state = VMState.STOPPED
        self._last_console = self.console
        directory = self._directory
        if directory is not None:
            if retained or (switch_off and directory.disk.exists()):
                record = self._record()
                record.retained = retained
                record.keep_disk = switch_off
                if not switch_off:
                    record.base_stat = stat_image(self._config.rootfs_path)
                directory.keep(record)
            else:
                directory.destroy()
        self._forget()
        self._deleted = True

    def close(self) -> None:
        """Hang up. The VM itself lives on, and the next ``run`` connects anew."""
        with self._guard:
            if self._guest is not None:
                self._guest.disconnect()

    def reboot(self, timeout: float | None = None, *, force: bool = False) -> Self:
        """Reboot on the same disk, and wait until the guest answers again.

        ``force``: like the reset button, nothing in the guest is asked, and what
        it had not written to its disk is lost. ``timeout``: seconds for all of
        it; None: as for ``start``.
        """
        with self._guard:
            machine = self._live_machine("reboot it")
            access.check_offers_ssh(self._config)
            assert self._guest is not None  # noqa: S101 - it offers SSH and runs
            assert self._backend is not None  # noqa: S101 - it was launched
            deadline = Deadline(booting.boot_timeout_s(timeout, self._backend))
            power.reset(self.vm_id, machine, self._guest, deadline, force=force)
            self._check_usable(0)
            self._guest.disconnect()
            self._connect(deadline, "while rebooting")
            return self

    @property
    def usage(self) -> Usage:
        """What the VM is used for; shown to people, and written down with it."""
        return self._usage

    @usage.setter
    def usage(self, usage: Usage) -> None:
        with self._guard:
            self._usage = usage
            if self._machine is not None:
                self._write_record()

    # -- within ---------------------------------------------------------------

    def _choose(self) -> Backend:
        guest = kernel_architecture(self._config.kernel_path)
        config = self._config
        beyond = not_on_firecracker(config, self._directory) if config.backend != "qemu" else []
        return choose(self._store, config.backend, self._wanted_accelerator, guest, beyond)

    @property
    def _itself(self) -> SmolVM:
        return self

    @property
    def _console_path(self) -> Path:
        return self.directory / "console.log"

    def _claim(self) -> None:
        if self._directory is None:
            reopen = self._retained is not None
            self._directory = self._store.claim(self.vm_id, reopen=reopen)
            record = self._directory.read_record()
            self._layers = record.layers if record is not None else []
            registry.add(self)

    def _forget(self) -> None:
        self._directory = None
        registry.discard(self.vm_id)

    def _write_record(self) -> None:
        if self._directory is not None:
            self._directory.write_record(self._record())

    def _record(self) -> VMRecord:
        config = self._config
        earlier = self._directory.read_record() if self._directory is not None else None
        record = new_record(self.vm_id, config.model_dump(mode="json"))
        record.status = self.status
        record.backend, record.accelerator = self.backend_name, self.accelerator
        record.timings = self.timings
        record.ssh_user = self._ssh_user
        record.ssh_key_path = str(self._ssh_key_path) if self._ssh_key_path else None
        record.usage = self._usage
        record.retained = self._retained
        record.layers = self._layers
        if earlier is not None:
            record.base_stat = earlier.base_stat
        # A disk that was kept before stays safe from the sweep until delete().
        record.keep_disk = keeps_its_disk(config) or bool(earlier and earlier.keep_disk)
        if record.keep_disk:
            record.base_fingerprint = fingerprint_of_image(config.rootfs_path, self._store.cache)
        if self._machine is not None:
            record.set_machine(self._machine.pid, self._machine.ssh_address)
        return record

    def _check_usable(self, grace_s: float) -> None:
        """Raise unless the machine runs; a dying one gets ``grace_s`` to be seen dead."""
        self._check_not_deleted()
        if self._machine is None:
            raise SmolVMError(f"the VM {self.vm_id!r} is {self.status}: start() it first")
        if self._machine.stalled:
            raise diagnosis.stalled(self.vm_id, self._machine.stalled, self.directory)
        end = self._machine.wait(grace_s) if grace_s else self._machine.poll()
        if end is not None:
            raise diagnosis.died(self.vm_id, self._during, end, self._console_path)
        if self._state is VMState.PAUSED:
            raise SmolVMError(f"the VM {self.vm_id!r} is paused: resume() it first")

    def _check_not_deleted(self) -> None:
        if self._deleted:
            raise SmolVMError(f"the VM {self.vm_id!r} was deleted: make a new SmolVM")

    def _require_owner(self, what: str) -> None:
        """Raise if another process owns the VM: see ``JoinedVM``."""

    def _ssh_address(self) -> tuple[str, int]:
        return self._live_machine("log into it").ssh_address

    def _live_machine(self, what: str) -> Machine:
        self._require_owner(what)
        self._check_not_deleted()
        if self._machine is None:
            raise SmolVMError(
                f"the VM {self.vm_id!r} is {self.status}: start() it before you {what}"
            )
        end = self._machine.poll()
        if end is not None:
            raise diagnosis.died(self.vm_id, "on its own", end, self._console_path)
        return self._machine

    def _live_guest(self) -> Guest:
        access.check_offers_ssh(self._config)
        if self._guest is None:
            self._check_usable(0)
            raise SmolVMError(f"the VM {self.vm_id!r} has not finished booting")
        return self._guest

    def _end_machine(self) -> None:
        if self._guest is not None:
            self._guest.disconnect()
            self._guest = None
        if self._machine is not None:
            self._machine.kill()
            self._machine = None

    def _give_up(self, *, keep: bool) -> None:
        """After a failed start: nothing runs, and nothing lies about but what is to be kept."""
        self._end_machine()
        self._state = VMState.ERROR
        self._last_console = self.console
        directory = self._directory
        if directory is None or keep:
            return
        record = directory.read_record()
        if record is not None and record.is_kept:
            directory.release()
        else:
            directory.destroy()
        self._forget()


def _settle_config(config: VMConfig | None, overrides: Mapping[str, Any]) -> VMConfig:
    given = {key: value for key, value in overrides.items() if value is not None}
    if config is None:
        kernel, rootfs = DistributionBuilder().build_micro_ssh_key()
        return VMConfig(kernel_path=kernel, rootfs_path=rootfs, boot_args=SSH_BOOT_ARGS, **given)
    # Validated again: model_copy(update=...) checks nothing, and files may have gone.
    return VMConfig.model_validate({**config.model_dump(), **given})
