"""From a configuration to a machine that runs: booted, or started from a template."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_smolvm.backends.base import Backend, Machine, MachineSpec, MemoryFile
from pytest_smolvm.config import VMConfig
from pytest_smolvm.disks import Disk, Image, copy_sparsely
from pytest_smolvm.images.guestfiles import SSH_SIGN
from pytest_smolvm.process import Deadline
from pytest_smolvm.snapshots import CONSOLE, MEMORY, STATE
from pytest_smolvm.store import Store, VMDirectory
from pytest_smolvm.templates import Template
from pytest_smolvm.vmdisk import disk_from_template, prepare_disk

BOOT_TIMEOUT_S = 60.0
BOOT_TIMEOUT_EMULATED_S = 180.0


@dataclass(frozen=True)
class Launched:
    """A machine that has been started, and the seconds that each step took."""

    machine: Machine
    spec: MachineSpec
    timings: dict[str, float]
    at: float
    """When it was launched (monotonic clock)."""
    layers: list[str]
    """What its disk lies over, in its directory, the nearest first."""


def boot_timeout_s(given: float | None, backend: Backend) -> float:
    """``given`` seconds, or the default for guests of that backend."""
    if given is not None:
        return given
    return BOOT_TIMEOUT_EMULATED_S if backend.accelerator == "tcg" else BOOT_TIMEOUT_S


def launch(
    config: VMConfig,
    backend: Backend,
    directory: VMDirectory,
    layers: Sequence[Path],
    store: Store,
    deadline: Deadline,
) -> Launched:
    """Prepare the disk and start the machine; the guest boots on while this returns."""
    began = time.monotonic()
    disk = prepare_disk(config, directory, layers, store, backend.disk_format)
    disk_done = time.monotonic()
    _put_console_aside(directory)
    spec = machine_spec(config, backend, directory, disk)
    return _launched(backend, spec, deadline, began, disk_done, layers)


def launch_from(
    template: Template,
    config: VMConfig,
    backend: Backend,
    directory: VMDirectory,
    deadline: Deadline,
) -> Launched:
    """Start a machine from a template, on a new disk; it is paused, and its agent waits."""
    began = time.monotonic()
    directory.disk.unlink(missing_ok=True)
    disk, layers = disk_from_template(config, directory, template.layers, backend.disk_format)
    disk_done = time.monotonic()
    _put_console_aside(directory)
    # A VM's console tells of its boot, whoever booted.
    copy_sparsely(template.path / CONSOLE, directory.console)
    spec = machine_spec(
        config,
        backend,
        directory,
        disk,
        memory=MemoryFile(template.path / MEMORY, shared=False),
        state=template.path / STATE,
    )
    return _launched(backend, spec, deadline, began, disk_done, layers)


def _launched(
    backend: Backend,
    spec: MachineSpec,
    deadline: Deadline,
    began: float,
    disk_done: float,
    layers: Sequence[Path],
) -> Launched:
    machine = backend.launch(spec, deadline)
    launched = time.monotonic()
    timings = {"disk": disk_done - began, "launch": launched - disk_done}
    return Launched(machine, spec, timings, launched, [layer.name for layer in layers])


def _put_console_aside(directory: VMDirectory) -> None:
    if directory.console.exists():
        # The boot before may be the one that somebody wants to look into.
        directory.console.replace(directory.earlier_console)


def machine_spec(
    config: VMConfig,
    backend: Backend,
    directory: VMDirectory,
    disk: Disk | None = None,
    memory: MemoryFile | None = None,
    state: Path | None = None,
) -> MachineSpec:
    """The machine of a configuration. Without ``disk``: as it will be, for ``describe``."""
    initrd = config.effective_initrd_path()
    return MachineSpec(
        vm_id=config.vm_id,
        directory=directory.path,
        kernel=config.kernel_path.absolute(),
        initrd=initrd.absolute() if initrd else None,
        boot_args=config.boot_args,
        vcpu_count=config.vcpu_count,
        mem_size_mib=config.mem_size_mib,
        disk=disk or Disk(Image(directory.disk_of(backend.disk_format), backend.disk_format)),
        network=config.network,
        accelerator=backend.accelerator,
        console=directory.console,
        console_sign=SSH_SIGN,
        machine_log=directory.machine_log,
        memory=memory,
        state=state,
    )
