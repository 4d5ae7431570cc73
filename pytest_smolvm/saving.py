"""What a VM leaves for others to start from, and what it can go back to."""

from __future__ import annotations

import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from pytest_smolvm import access, booting, snapshots, waking
from pytest_smolvm.backends.base import Backend, Machine, MachineSpec
from pytest_smolvm.config import VMConfig
from pytest_smolvm.errors import SmolVMError
from pytest_smolvm.guest import Guest
from pytest_smolvm.images.manifest import ImageManifest, read_manifest
from pytest_smolvm.process import Deadline
from pytest_smolvm.records import VMState
from pytest_smolvm.store import Store, VMDirectory
from pytest_smolvm.templates import Template, TemplateFacts, shared_templates
from pytest_smolvm.vmdisk import stat_image
from pytest_smolvm.waking import Identity

SNAPSHOT_TIMEOUT_S = 120.0


class Saving(ABC):
    """The part of ``SmolVM`` that saves its guest, and wakes one that was saved."""

    _config: VMConfig
    _store: Store
    _state: VMState
    _backend: Backend | None
    _machine: Machine | None
    _guest: Guest | None
    _directory: VMDirectory | None
    _ssh_user: str
    _ssh_key_path: Path | None
    _timings: dict[str, float]
    _spec: MachineSpec | None
    _layers: list[str]
    _guard: threading.RLock

    @abstractmethod
    def _check_usable(self, grace_s: float) -> None:
        """Raise unless the machine runs."""

    @abstractmethod
    def _check_not_deleted(self) -> None:
        """Raise if its life is over."""

    @abstractmethod
    def _require_owner(self, what: str) -> None:
        """Raise if another process owns the VM."""

    @abstractmethod
    def _live_machine(self, what: str) -> Machine:
        """The machine, or an error that says why one cannot ``what``."""

    @abstractmethod
    def _end_machine(self) -> None:
        """End the machine, if there is one."""

    @abstractmethod
    def _give_up(self, *, keep: bool) -> None:
        """After a failed start: nothing runs."""

    @abstractmethod
    def _go_back_to(self, template: Template) -> None:
        """Start from the template."""

    @property
    def _files(self) -> VMDirectory:
        assert self._directory is not None  # noqa: S101 - claimed by whoever starts it
        return self._directory

    def snapshot(self) -> Template:
        """Save memory, devices and disk as they are, for other VMs to start from.

        The VM stands still for some hundred milliseconds, and runs on; its SSH connections are
        made anew. Raises ``SmolVMError`` where that cannot be: without SSH, with a shared disk,
        with an image that has no agent.
        """
        with self._guard:
            self._live_machine("take a snapshot of it")
            self._check_usable(0)
            return self._take_snapshot()

    def restore(self, template: Template) -> Self:
        """Go back to where ``template`` was made; what happened in the guest since is gone.

        The VM keeps its id, and the ports that ``expose_local`` opened. Raises ``SmolVMError``
        for a template of another configuration.
        """
        with self._guard:
            self._require_owner("restore it")
            self._check_not_deleted()
            self._check_fits(template)
            forwards = self._machine.forwards if self._machine is not None else {}
            self._end_machine()
            try:
                self._go_back_to(template)
                for host_port, guest_port in forwards.items():
                    self._live_machine("open its ports").forward(guest_port, host_port)
            except BaseException:
                self._give_up(keep=True)
                raise
            return self

    # -- within ---------------------------------------------------------------

    def _why_not_saved(self) -> str:
        """Why neither this VM nor one like it can be saved; empty: it can."""
        assert self._backend is not None  # noqa: S101 - chosen
        if not self._backend.can_restore:
            return f"the backend {self._backend.name!r} cannot save machines"
        if self._config.disk_mode != "isolated":
            return "its disk is shared with other VMs (disk_mode='isolated' gives it its own)"
        if self._spec is not None and self._spec.disk.image.format != self._backend.disk_format:
            return (
                f"its disk was made by another backend, as {self._spec.disk.image.format}; one of "
                f"{self._backend.name}'s own is {self._backend.disk_format}"
            )
        if not self._manifest().agent:
            return (
                f"the image {self._config.rootfs_path} lacks the agent that a restored guest "
                "needs; images made by ImageBuilder have it"
            )
        return ""

    def _manifest(self) -> ImageManifest:
        return read_manifest(self._config.rootfs_path) or ImageManifest(host_key="")

    def _wake(self, identity: Identity, deadline: Deadline) -> None:
        assert self._machine is not None  # noqa: S101 - it was launched
        waking.wake(self._machine, identity, deadline)

    def _log_in_on_port(self, deadline: Deadline) -> None:
        assert self._machine is not None and self._guest is not None  # noqa: S101, PT018
        # A duplicate: when that is closed the machine's end of the port stays open.
        self._guest.connect_on(self._machine.port.dup(), deadline)

    def _save(
        self,
        make: Callable[[Callable[[Path], TemplateFacts]], Template],
        key: str,
        identity: Identity,
        *,
        fresh: bool = False,
    ) -> Template:
        """Save the guest by ``make``, and go on with it as ``identity``, over its port.

        ``fresh``: nothing has happened in it since it booted.
        """
        machine, guest, spec, backend = self._machine, self._guest, self._spec, self._backend
        assert machine and guest and spec and backend  # noqa: S101, PT018 - it runs
        manifest = self._manifest()
        deadline = Deadline(SNAPSHOT_TIMEOUT_S)
        layers = [self._files.path / name for name in self._layers]

        def write(target: Path) -> TemplateFacts:
            names = snapshots.save(machine, spec, backend, layers, f"layer-{key}", target, deadline)
            return self._facts(key, backend.describe(spec), names, fresh=fresh)

        try:
            waking.lay_down(
                guest,
                machine,
                manifest.agent,
                deadline,
                has_boot_id=manifest.reads_boot_id or not fresh,
            )
            snapshots.wait_until_quiet(machine)
            try:
                template = make(write)
            finally:
                self._wake(identity, deadline)
                self._log_in_on_port(deadline)
        except BaseException:
            # It answers over its network, as it did before.
            guest.disconnect()
            raise
        return template

    def _take_snapshot(self) -> Template:
        """A template of the VM as it is, which goes with this process."""
        access.check_offers_ssh(self._config)
        if problem := self._why_not_saved():
            raise SmolVMError(
                f"no snapshot can be taken of the VM {self._config.vm_id!r}: {problem}"
            )
        identity = Identity(self._config.vm_id, machine_id=None, boot_id=None)
        templates = shared_templates(self._store)
        return self._save(templates.make_owned, secrets.token_hex(16), identity)

    def _check_fits(self, template: Template) -> None:
        """Raise unless this VM's machine can start from the template."""
        backend = self._backend
        if backend is None:
            raise SmolVMError(
                f"the VM {self._config.vm_id!r} never started: SmolVM.from_template(...) makes a "
                "VM that starts from a template"
            )
        if not template.path.is_dir():
            raise SmolVMError(f"the template {template.key} is gone: it was deleted")
        made_by = backend.describe(booting.machine_spec(self._config, backend, self._files))
        if (template.facts.made_by, template.facts.disk) != (made_by, self._image()):
            raise SmolVMError(
                f"the template {template.key} was made of a VM of another configuration, "
                f"or over another image ({template.facts.vm_id}): {self._config.vm_id} cannot "
                "start from it"
            )

    def _image(self) -> list[str | int]:
        """The root image as it is now: path, size, time of the last change (ns)."""
        return [str(self._config.rootfs_path), *stat_image(self._config.rootfs_path)]

    def _facts(
        self, key: str, made_by: list[str], layers: list[str], *, fresh: bool
    ) -> TemplateFacts:
        facts: dict[str, Any] = {
            "key": key,
            "vm_id": self._config.vm_id,
            "config": self._config.model_dump(mode="json"),
            "ssh_user": self._ssh_user,
            "ssh_key_path": str(self._ssh_key_path) if self._ssh_key_path else None,
            "accelerator": self._backend.accelerator if self._backend else "",
            "made_by": made_by,
            "layers": layers,
            "disk": self._image(),
            "fresh": fresh,
        }
        return TemplateFacts.model_validate(facts)
