"""Who owns the state on this host, and who sweeps it.

::

    <state>/                       0700; SMOLVM_STATE_DIR, or the platform's user state dir
        vms/<vm id>/               one directory per VM
            lock                   held by the owner for as long as it lives
            vm.json                VMRecord
            disk.qcow2, or disk.raw  console.log  commands.jsonl  machine.log
            README.txt             in directories that were kept
        images/  keys/  cache/

A VM directory whose lock nobody holds has no live owner. Unless its record
says that it is to be kept, it is rubbish, and whoever comes next sweeps it.
Lock files appear and vanish only under the store's own short lock, so nobody
can hold a lock on a file that is no longer there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from pytest_smolvm.disks import ImageFormat
from pytest_smolvm.errors import SmolVMError, VMAlreadyExistsError, VMNotFoundError
from pytest_smolvm.identity import ProcessIdentity
from pytest_smolvm.keepsake import README_NAME, readme
from pytest_smolvm.records import (
    RECORD_NAME,
    Retained,
    VMRecord,
    VMState,
    find_disk,
    is_kept,
    read_record,
)
from pytest_smolvm.statedir import (
    check_usable,
    default_state_dir,
    locked,
    make_private_dir,
    remove_tree,
    try_lock,
    write_atomically,
)

STORE_LOCK_TIMEOUT_S = 60


class VMDirectory:
    """One VM's directory, owned by this process until ``release`` or ``destroy``."""

    def __init__(self, store: Store, vm_id: str, lock: FileLock) -> None:
        self.path = store.vms / vm_id
        self.vm_id = vm_id
        self._store = store
        self._lock = lock

    @property
    def disk(self) -> Path:
        """The disk that is there, or that there will be."""
        return find_disk(self.path) or self.disk_of("qcow2")

    def disk_of(self, kind: ImageFormat) -> Path:
        """Where a new disk of that format goes."""
        return self.path / f"disk.{kind}"

    @property
    def console(self) -> Path:
        return self.path / "console.log"

    @property
    def earlier_console(self) -> Path:
        return self.path / "console.1.log"

    @property
    def machine_log(self) -> Path:
        return self.path / "machine.log"

    def read_record(self) -> VMRecord | None:
        return read_record(self.path)

    def write_record(self, record: VMRecord) -> None:
        _write_record(self.path, record)

    def keep(self, record: VMRecord) -> None:
        """Give up ownership; the directory stays, with a text that explains it."""
        _write_kept(self.path, record)
        self._lock.release()

    def release(self) -> None:
        """Give up ownership; the directory stays as it is."""
        self._lock.release()

    def destroy(self) -> None:
        """Remove the directory with all it holds, and give up ownership."""
        with self._store.guarded():
            try:
                remove_tree(self.path)
            finally:
                self._lock.release()


class Store:
    """The state directory of this library on this host."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = make_private_dir(root if root is not None else default_state_dir())
        check_usable(self.root)
        self.vms = make_private_dir(self.root / "vms")

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def guarded(self) -> contextlib.AbstractContextManager[None]:
        """The store's own lock, for the moments when lock files come and go."""
        return locked(
            self.root / "store.lock",
            operation="waiting for the state directory's lock",
            timeout_s=STORE_LOCK_TIMEOUT_S,
        )

    def claim(self, vm_id: str, *, reopen: bool = False) -> VMDirectory:
        """Own the directory of ``vm_id``, new or left with a kept disk.

        A live owner elsewhere is a ``VMAlreadyExistsError``; what a dead owner
        left behind is swept first. What was kept only to be looked at is moved
        aside, to an id of its own, unless it is to be opened again (``reopen``).
        """
        with self.guarded():
            path = self.vms / vm_id
            lock = self._try_lock(path)
            if lock is None:
                raise _in_use(
                    path, "delete that one first, or choose another vm_id (None generates one)"
                )
            _kill_leftover_machine(path)
            record = read_record(path)
            if record and record.retained and not record.keep_disk and not reopen:
                self._move_aside(path, record)
                lock.release()
                lock = self._try_lock(path)
                if lock is None:
                    raise SmolVMError(f"{path} was taken while its lock was held: try again")
            elif not is_kept(path):
                _empty_directory(path)
            return VMDirectory(self, vm_id, lock)

    def is_owned(self, vm_id: str) -> bool:
        """Whether a live process owns the VM."""
        with self.guarded():
            path = self.vms / vm_id
            if not path.is_dir():
                return False
            lock = self._try_lock(path)
            if lock is None:
                return True
            lock.release()
            return False

    def sweep(self) -> list[str]:
        """Remove what dead owners left; return the ids removed.

        Kept directories stay, and so do those that a live heir has yet to adopt.
        """
        swept = []
        for path in self._unowned():
            _kill_leftover_machine(path)
            record = read_record(path)
            heir = record.usage.heir if record else None
            if not is_kept(path) and not (heir and heir.is_alive()):
                remove_tree(path)
                swept.append(path.name)
        return swept

    def adopt(self, heir: ProcessIdentity) -> list[VMRecord]:
        """Keep what dead owners left to ``heir``, to be looked at; return what was kept."""
        adopted = []
        for path in self._unowned():
            record = read_record(path)
            if record is None or record.is_kept or record.usage.heir != heir:
                continue
            _kill_leftover_machine(path)
            record.status = VMState.ERROR
            record.clear_machine()
            record.retained = Retained(
                reason=f"its owner, process {record.owner_pid}, died", at=time.time()
            )
            _write_kept(path, record)
            adopted.append(record)
        return adopted

    def remove(self, vm_id: str) -> None:
        """Remove what was kept of a VM, disk and all.

        ``VMNotFoundError`` if there is none; one that a live process owns is an
        error too.
        """
        with self.guarded():
            path = self._existing(vm_id)
            lock = self._try_lock(path)
            if lock is None:
                raise _in_use(path, "it can be removed when that has ended")
            try:
                _kill_leftover_machine(path)
                remove_tree(path)
            finally:
                lock.release()

    def drop_disk(self, vm_id: str, why: str) -> None:
        """Remove the disk of a VM that was kept to be looked at; the rest stays."""
        with self.guarded():
            path = self._existing(vm_id)
            lock = self._try_lock(path)
            if lock is None:
                return  # somebody is looking at it right now
            try:
                record = read_record(path)
                if record is None or record.retained is None or record.keep_disk:
                    return
                for disk in [*path.glob("*.qcow2"), *path.glob("*.raw")]:
                    disk.unlink()
                record.retained = record.retained.model_copy(update={"without_disk": why})
                _write_kept(path, record)
            finally:
                lock.release()

    def find(self, vm_id: str) -> Path:
        """The directory of a VM, live or kept. ``VMNotFoundError`` if there is none."""
        return self._existing(vm_id)

    def _existing(self, vm_id: str) -> Path:
        path = self.vms / vm_id
        if "/" in vm_id or vm_id in ("", ".", "..") or not path.is_dir():
            known = sorted(entry.name for entry in self.vms.iterdir())
            raise VMNotFoundError(
                f"there is no VM called {vm_id!r} on this host: "
                + (f"there are {', '.join(known)}" if known else "there are none"),
                {"vm_id": vm_id, "known": known},
            )
        return path

    def _move_aside(self, path: Path, record: VMRecord) -> None:
        record.vm_id = f"{record.vm_id[:50].rstrip('-')}-{secrets.token_hex(4)}"
        record.config["vm_id"] = record.vm_id
        aside = self.vms / record.vm_id
        path.rename(aside)
        _write_kept(aside, record)

    def _unowned(self) -> Iterator[Path]:
        """The directories that nobody owns, each ours for as long as it is looked at."""
        with self.guarded():
            for path in sorted(self.vms.iterdir()):
                lock = self._try_lock(path) if path.is_dir() else None
                if lock is None:
                    continue
                try:
                    yield path
                finally:
                    lock.release()

    @staticmethod
    def _try_lock(path: Path) -> FileLock | None:
        return try_lock(make_private_dir(path) / "lock")


def _in_use(path: Path, advice: str) -> VMAlreadyExistsError:
    record = read_record(path)
    owner = f"process {record.owner_pid}" if record else "another process"
    return VMAlreadyExistsError(
        f"a VM called {path.name!r} is in use by {owner}: {advice}",
        {"vm_id": path.name},
    )


def _write_record(path: Path, record: VMRecord) -> None:
    write_atomically(path / RECORD_NAME, record.model_dump_json(indent=1).encode())


def _write_kept(path: Path, record: VMRecord) -> None:
    _write_record(path, record)
    write_atomically(path / README_NAME, readme(record, path).encode())


def _kill_leftover_machine(path: Path) -> None:
    # Only where nothing killed the machine together with its owner (no setpriv).
    record = read_record(path)
    if record and record.machine_pid and record.machine_start_ticks:
        ProcessIdentity(record.machine_pid, record.machine_start_ticks).kill()


def _empty_directory(path: Path) -> None:
    for entry in path.iterdir():
        if entry.name == "lock":
            continue
        if entry.is_dir() and not entry.is_symlink():
            remove_tree(entry)
        else:
            entry.unlink()


_stores: dict[tuple[int, Path], Store] = {}


def shared_store(root: Path | None = None) -> Store:
    """The store of a root (default: this host's), swept once per process and root."""
    root = root if root is not None else default_state_dir()
    key = (os.getpid(), root)
    store = _stores.get(key)
    if store is None or not store.vms.is_dir():
        store = Store(root)
        store.sweep()
        _stores[key] = store
    return store
