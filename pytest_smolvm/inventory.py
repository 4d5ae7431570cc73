"""What VMs there are on this host, live and kept."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from pytest_smolvm.records import VMRecord, read_record
from pytest_smolvm.statedir import allocated_bytes
from pytest_smolvm.store import Store


@dataclass(frozen=True)
class Entry:
    """One VM directory."""

    vm_id: str
    record: VMRecord
    live: bool
    """Whether a process owns it now."""
    path: Path

    @property
    def age_s(self) -> float:
        """Seconds since it was kept, or since it was made."""
        retained = self.record.retained
        since = retained.at if retained and not self.live else self.record.created_at
        return max(0.0, time.time() - since)

    @property
    def size_bytes(self) -> int:
        """What its files take of the host's disk now, but for those that others have too."""
        return allocated_bytes(self.path, linked=False)


def inventory(store: Store) -> list[Entry]:
    """Every VM with a record that can be read, by id."""
    entries = []
    for path in sorted(store.vms.iterdir()):
        record = read_record(path)
        if record is not None:
            entries.append(Entry(path.name, record, store.is_owned(path.name), path))
    return entries
