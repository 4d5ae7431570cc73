"""Whether one more VM fits into the host's memory, where all that run may grow to full size."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from pytest_smolvm.hostmemory import available_mib
from pytest_smolvm.identity import ProcessIdentity
from pytest_smolvm.statedir import locked, make_private_dir, read_json, write_json
from pytest_smolvm.store import Store

OVERHEAD_MIB = 96
"""What an emulator takes beside its guest's memory: code that it made, buffers."""
RESERVE_MIB = 512
"""What stays for everybody else."""
_LOCK_TIMEOUT_S = 10.0
_MACHINE = re.compile(rb"\0-name\0smolvm-([^\0]*)\0.*\0-m\0(\d+)M\0", re.DOTALL)


@contextlib.contextmanager
def admitted(
    store: Store,
    vm_id: str,
    mem_size_mib: int,
    *,
    available: Callable[[], int | None] = available_mib,
    proc: Path = Path("/proc"),
) -> Iterator[bool]:
    """Whether a VM of that size fits; what it may take is spoken for while the block runs.

    Counted are the machines of every user and state directory, and, of those that have yet to
    start, this state directory's.
    """
    pending = make_private_dir(store.root / "admissions")
    mine = pending / f"{vm_id}.json"
    wanted = mem_size_mib + OVERHEAD_MIB
    with locked(
        pending / "lock",
        operation="waiting for another process to look at the host's memory",
        timeout_s=_LOCK_TIMEOUT_S,
    ):
        left = available()
        # Where there is no way to tell, the user's own bound has to do.
        fits = left is None or left - _growth_mib(proc, pending) - wanted >= RESERVE_MIB
        if fits:
            owner = ProcessIdentity.of(os.getpid())
            ticks = owner.start_ticks if owner else 0
            write_json(mine, {"mib": wanted, "pid": os.getpid(), "start_ticks": ticks})
    try:
        yield fits
    finally:
        mine.unlink(missing_ok=True)


def _growth_mib(proc: Path, pending: Path) -> int:
    """What all VMs of this host may yet take beside what they have."""
    running = dict(_machines(proc))
    total = sum(running.values())
    for path in pending.glob("*.json"):
        facts = read_json(path)
        if not isinstance(facts, dict) or path.stem in running:
            continue
        if ProcessIdentity(facts["pid"], facts["start_ticks"]).is_alive():
            total += int(facts["mib"])
        else:
            path.unlink(missing_ok=True)
    return total


def _machines(proc: Path) -> Iterator[tuple[str, int]]:
    """The ids of the VMs that run, and by how many MiB each may grow."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    for folder in proc.glob("[0-9]*"):
        # Processes come and go.
        with contextlib.suppress(OSError, ValueError, IndexError):
            found = _MACHINE.search((folder / "cmdline").read_bytes())
            if found:
                fields = (folder / "statm").read_text().split()
                own_mib = (int(fields[1]) - int(fields[2])) * page_bytes >> 20
                most_mib = int(found[2]) + OVERHEAD_MIB
                yield found[1].decode(), max(0, most_mib - own_mib)
