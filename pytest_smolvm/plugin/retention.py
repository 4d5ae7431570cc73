"""How much of what was kept stays: so many sessions, so many bytes, for each project."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from pytest_smolvm.errors import VMAlreadyExistsError, VMNotFoundError
from pytest_smolvm.inventory import Entry, inventory
from pytest_smolvm.plugin.session import run_of
from pytest_smolvm.plugin.settings import settings_of
from pytest_smolvm.statedir import locked
from pytest_smolvm.store import Store

_LOCK_TIMEOUT_S = 5.0


def enforce(state_dir: Path, config: pytest.Config) -> None:
    """Drop what is too much of this project's, the oldest first.

    ``smolvm_retention_count`` sessions that kept something stay, this one included; together
    their VMs take at most ``smolvm_retention_max_mib`` MiB of disk. When this session alone takes
    more, the latest of its VMs lose their disks, and then all the rest: the first
    failures of a run tell most. VMs whose configuration asks for their disk
    to be kept, and live ones, are neither counted nor touched.
    """
    store, run, settings = Store(state_dir), run_of(config), settings_of(config)
    with locked(
        store.root / "retention.lock",
        operation="waiting for another test run to clear out old VMs",
        timeout_s=_LOCK_TIMEOUT_S,
    ):
        entries = sorted(_candidates(store, run.project), key=_age_order)
        entries = _drop_sessions(store, entries, settings.retention_count)
        _drop_bytes(store, entries, run.session_id, settings.retention_max_mib << 20)


def _candidates(store: Store, project: str) -> list[Entry]:
    return [
        entry
        for entry in inventory(store)
        if entry.record.retained
        and entry.record.usage.project == project
        and not entry.record.keep_disk
        and not entry.live
    ]


def _age_order(entry: Entry) -> tuple[str, float]:
    retained = entry.record.retained
    return entry.record.usage.session, retained.at if retained else 0.0


def _drop_sessions(store: Store, entries: list[Entry], count: int) -> list[Entry]:
    sessions = sorted({entry.record.usage.session for entry in entries})
    staying = set(sessions[-count:]) if count else set()
    for entry in entries:
        if entry.record.usage.session not in staying:
            _remove(store, entry)
    return [entry for entry in entries if entry.record.usage.session in staying]


def _remove(store: Store, entry: Entry) -> None:
    # Somebody may have removed it by hand meanwhile, or be about to look at it.
    with contextlib.suppress(VMNotFoundError, VMAlreadyExistsError):
        store.remove(entry.vm_id)


def _drop_bytes(store: Store, entries: list[Entry], session: str, limit: int) -> None:
    sizes = {entry.vm_id: entry.size_bytes for entry in entries}
    for entry in entries:
        if sum(sizes.values()) <= limit:
            return
        if entry.record.usage.session != session:
            _remove(store, entry)
            del sizes[entry.vm_id]
    newest_first = [entry for entry in reversed(entries) if entry.vm_id in sizes]
    for entry in newest_first:
        if sum(sizes.values()) <= limit:
            return
        with contextlib.suppress(VMNotFoundError):
            store.drop_disk(
                entry.vm_id,
                f"smolvm_retention_max_mib = {limit >> 20} was reached, and it was the latest",
            )
        sizes[entry.vm_id] = entry.size_bytes
    for entry in newest_first:
        if sum(sizes.values()) <= limit:
            return
        _remove(store, entry)
        del sizes[entry.vm_id]
