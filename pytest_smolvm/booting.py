"""From a configuration to a machine that runs."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pytest_smolvm.backends.base import Backend, Machine, MachineSpec
from pytest_smolvm.config import VMConfig
from pytest_smolvm.disks import Disk
from pytest_smolvm.process import Deadline
from pytest_smolvm.store import Store, VMDirectory
from pytest_smolvm.vmdisk import prepare_disk

BOOT_TIMEOUT_S = 60.0
BOOT_TIMEOUT_EMULATED_S = 180.0


@dataclass(frozen=True)
class Launched:
    """A machine that has begun to boot, and the seconds that each step took."""

    machine: Machine
    timings: dict[str, float]
    at: float
    """When it was launched (monotonic clock)."""


def boot_timeout_s(given: float | None, backend: Backend) -> float:
    """``given`` seconds, or the default for guests of that backend."""
    if given is not None:
        return given
    return BOOT_TIMEOUT_EMULATED_S if backend.accelerator == "tcg" else BOOT_TIMEOUT_S


def launch(
    config: VMConfig, backend: Backend, directory: VMDirectory, store: Store, deadline: Deadline
) -> Launched:
    """Prepare the disk and start the machine; the guest boots on while this returns."""
    began = time.monotonic()
    disk = prepare_disk(config, directory, store)
    disk_done = time.monotonic()
    if directory.console.exists():
        # The boot before may be the one that somebody wants to look into.
        directory.console.replace(directory.earlier_console)
    machine = backend.launch(_spec(config, backend, directory, disk), deadline)
    launched = time.monotonic()
    timings = {"disk": disk_done - began, "launch": launched - disk_done}
    return Launched(machine, timings, launched)


def _spec(config: VMConfig, backend: Backend, directory: VMDirectory, disk: Disk) -> MachineSpec:
    initrd = config.effective_initrd_path()
    return MachineSpec(
        vm_id=config.vm_id,
        directory=directory.path,
        kernel=config.kernel_path.absolute(),
        initrd=initrd.absolute() if initrd else None,
        boot_args=config.boot_args,
        vcpu_count=config.vcpu_count,
        mem_size_mib=config.mem_size_mib,
        disk=disk,
        network=config.network,
        accelerator=backend.accelerator,
        console=directory.console,
        machine_log=directory.machine_log,
    )
