"""What is written down about a VM, for other processes and for later ones."""

from __future__ import annotations

import enum
import os
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pytest_smolvm.identity import ProcessIdentity

RECORD_NAME = "vm.json"


class VMState(enum.StrEnum):
    """Where a VM is in its life."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    ERROR = "error"


class Usage(BaseModel):
    """What a VM is used for: free text for people and for retention, nothing else."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    test: str = ""
    """The test that has it, or had it last."""
    project: str = ""
    """The directory of the test suite."""
    session: str = ""
    """The test run; ids of later runs sort after those of earlier ones."""
    heir_pid: int | None = None
    heir_start_ticks: int | None = None
    """A process that wants what is left should the owner die; see ``Store.adopt``."""

    @property
    def heir(self) -> ProcessIdentity | None:
        if self.heir_pid is None or self.heir_start_ticks is None:
            return None
        return ProcessIdentity(self.heir_pid, self.heir_start_ticks)


class Retained(BaseModel):
    """Why a VM's directory was kept after its end, and when."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    reason: str
    at: float
    """Seconds since the epoch."""
    without_disk: str = ""
    """Why the disk is not there; empty: it was kept, or there never was one."""


class VMRecord(BaseModel):
    """What other processes may know of a VM; written by its owner only."""

    model_config = ConfigDict(extra="ignore")

    vm_id: str
    config: dict[str, Any]
    owner_pid: int
    created_at: float
    """Seconds since the epoch."""
    status: VMState = VMState.CREATED
    backend: str = ""
    accelerator: str = ""
    timings: dict[str, float] = Field(default_factory=dict)
    """Seconds of each phase of the last start."""
    machine_pid: int | None = None
    machine_start_ticks: int | None = None
    ssh_host: str | None = None
    ssh_port: int | None = None
    ssh_user: str = "root"
    ssh_key_path: str | None = None
    keep_disk: bool = False
    """Never swept: a later VM of the same id continues from the disk."""
    base_fingerprint: str | None = None
    """SHA-256 of the image under a kept disk."""
    base_stat: list[int] | None = None
    """Size and mtime (ns) of the image under a disk that was kept to be looked at."""
    layers: list[str] = Field(default_factory=list)
    """Files beside the disk that it lies over, the nearest first; the image is under them."""
    usage: Usage = Usage()
    retained: Retained | None = None
    """Set when the directory was kept to be looked at; it is never swept then."""

    @property
    def is_kept(self) -> bool:
        return self.keep_disk or self.retained is not None

    def set_machine(self, pid: int, ssh_address: tuple[str, int]) -> None:
        """Note the process that runs the machine, and where its SSH server is met."""
        self.ssh_host, self.ssh_port = ssh_address
        if identity := ProcessIdentity.of(pid):
            self.machine_pid = identity.pid
            self.machine_start_ticks = identity.start_ticks

    def clear_machine(self) -> None:
        """Note that no machine runs."""
        self.ssh_host = self.ssh_port = None
        self.machine_pid = self.machine_start_ticks = None


def new_record(vm_id: str, config: dict[str, Any]) -> VMRecord:
    return VMRecord(vm_id=vm_id, config=config, owner_pid=os.getpid(), created_at=time.time())


def find_disk(path: Path) -> Path | None:
    """The disk in a VM directory, of whichever format; None: there is none."""
    found = (path / "disk.qcow2", path / "disk.raw")
    return next((disk for disk in found if disk.exists()), None)


def read_record(path: Path) -> VMRecord | None:
    """The record in a VM directory; None when there is none that can be read."""
    try:
        return VMRecord.model_validate_json((path / RECORD_NAME).read_bytes())
    except (OSError, ValidationError):
        return None


def is_kept(path: Path) -> bool:
    """Whether a VM directory holds what somebody asked to keep.

    A record that cannot be understood (written by another release, say)
    counts as such a request: a disk too many is better than one lost.
    """
    if not (path / RECORD_NAME).exists():
        return False
    record = read_record(path)
    return record.is_kept if record is not None else find_disk(path) is not None
