"""Where state lies on the host, who owns it, and who sweeps it.

::

    <state>/                       0700; SMOLVM_STATE_DIR, or the platform's user state dir
        vms/<vm id>/               one directory per VM
            lock                   held by the owner for as long as it lives
            vm.json                VMRecord
            disk.qcow2  console.log  machine.log
        images/  keys/  cache/

A VM directory whose lock nobody holds has no live owner. Unless its record
says that its disk is to be kept, it is rubbish, and whoever comes next sweeps
it. Lock files appear and vanish only under the store's own short lock, so
nobody can hold a lock on a file that is no longer there.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from pytest_smolvm.errors import OperationTimeoutError, SmolVMError, VMAlreadyExistsError
from pytest_smolvm.process import ProcessIdentity

STORE_LOCK_TIMEOUT_S = 60


class VMState(enum.StrEnum):
    """Where a VM is in its life."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    ERROR = "error"


class VMRecord(BaseModel):
    """What other processes may know of a VM; written by its owner only."""

    model_config = ConfigDict(extra="ignore")

    vm_id: str
    config: dict[str, Any]
    owner_pid: int
    created_at: float
    """Seconds since the epoch."""
    status: VMState = VMState.CREATED
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

    def set_machine(self, pid: int, ssh_address: tuple[str, int]) -> None:
        """Note the process that runs the machine, and where its SSH server is met."""
        self.ssh_host, self.ssh_port = ssh_address
        if identity := ProcessIdentity.of(pid):
            self.machine_pid = identity.pid
            self.machine_start_ticks = identity.start_ticks


def default_state_dir() -> Path:
    """``SMOLVM_STATE_DIR``, or ``pytest-smolvm`` in the platform's user state directory."""
    given = os.environ.get("SMOLVM_STATE_DIR")
    if given:
        return Path(given).expanduser().absolute()
    return platformdirs.user_state_path("pytest-smolvm")


def make_private_dir(path: Path) -> Path:
    """Make the directory and its parents, each 0700 if it is new; errors say what to do."""
    try:
        # mkdir(parents=True) would make the parents with the default mode.
        for folder in (*reversed(path.parents), path):
            if not folder.is_dir():
                folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SmolVMError(
            f"the directory {path} cannot be made: {error.strerror}; set SMOLVM_STATE_DIR to a "
            "directory that you can write to",
            {"path": str(path)},
        ) from error
    return path


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file that is there whole or not at all, whatever interrupts."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SmolVMError(f"{path} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def locked(
    path: Path,
    *,
    operation: str,
    timeout_s: float,
    on_wait: Callable[[], object] = lambda: None,
) -> Iterator[None]:
    """Hold the lock file ``path``; waiting longer than ``timeout_s`` is an error.

    ``on_wait`` is called if another holds it, before the wait.
    """
    lock = FileLock(path, mode=0o600)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            on_wait()
            lock.acquire(timeout=timeout_s, poll_interval=0.02)
    except Timeout:
        raise OperationTimeoutError(
            operation, timeout_s, f"another process holds {path}; see: fuser -v {path}"
        ) from None
    try:
        yield
    finally:
        lock.release()


class VMDirectory:
    """One VM's directory, owned by this process until ``release`` or ``destroy``."""

    def __init__(self, store: Store, vm_id: str, lock: FileLock) -> None:
        self.path = store.vms / vm_id
        self.vm_id = vm_id
        self._store = store
        self._lock = lock

    @property
    def disk(self) -> Path:
        return self.path / "disk.qcow2"

    @property
    def console(self) -> Path:
        return self.path / "console.log"

    @property
    def machine_log(self) -> Path:
        return self.path / "machine.log"

    def read_record(self) -> VMRecord | None:
        return read_record(self.path)

    def write_record(self, record: VMRecord) -> None:
        data = record.model_dump_json(indent=1).encode()
        write_atomically(self.path / "vm.json", data)

    def release(self) -> None:
        """Give up ownership; the directory stays."""
        self._lock.release()

    def destroy(self) -> None:
        """Remove the directory with all it holds, and give up ownership."""
        with self._store.guarded():
            try:
                _remove_tree(self.path)
            finally:
                self._lock.release()


class Store:
    """The state directory of this library on this host."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = make_private_dir(root if root is not None else default_state_dir())
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

    def claim(self, vm_id: str) -> VMDirectory:
        """Own the directory of ``vm_id``, new or left with a kept disk.

        A live owner elsewhere is a ``VMAlreadyExistsError``; what a dead owner
        left behind is swept first.
        """
        with self.guarded():
            path = self.vms / vm_id
            lock = self._try_lock(path)
            if lock is None:
                record = read_record(path)
                owner = f"process {record.owner_pid}" if record else "another process"
                raise VMAlreadyExistsError(
                    f"a VM called {vm_id!r} is in use by {owner}: delete that one first, or "
                    "choose another vm_id (None generates one)",
                    {"vm_id": vm_id},
                )
            _kill_leftover_machine(path)
            if not keeps_disk(path):
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
        """Remove what dead owners left, but for kept disks; return the ids removed."""
        swept = []
        with self.guarded():
            for path in sorted(self.vms.iterdir()):
                if not path.is_dir():
                    continue
                lock = self._try_lock(path)
                if lock is None:
                    continue
                try:
                    _kill_leftover_machine(path)
                    if not keeps_disk(path):
                        _remove_tree(path)
                        swept.append(path.name)
                finally:
                    lock.release()
        return swept

    @staticmethod
    def _try_lock(path: Path) -> FileLock | None:
        make_private_dir(path)
        # thread_local: a VM may be deleted by another thread than its maker.
        # is_singleton: two owners within one process must exclude each other too.
        lock = FileLock(path / "lock", mode=0o600, thread_local=False, is_singleton=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return None
        return lock


def read_record(path: Path) -> VMRecord | None:
    """The record in a VM directory; None when there is none that can be read."""
    try:
        return VMRecord.model_validate_json((path / "vm.json").read_bytes())
    except (OSError, ValidationError):
        return None


def keeps_disk(path: Path) -> bool:
    """Whether a VM directory holds a disk that somebody asked to keep.

    A record that cannot be understood (written by another release, say)
    counts as such a request: a disk too many is better than one lost.
    """
    if not (path / "vm.json").exists():
        return False
    record = read_record(path)
    return record.keep_disk if record is not None else (path / "disk.qcow2").exists()


def new_record(vm_id: str, config: dict[str, Any]) -> VMRecord:
    return VMRecord(vm_id=vm_id, config=config, owner_pid=os.getpid(), created_at=time.time())


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
            _remove_tree(entry)
        else:
            entry.unlink()


def _remove_tree(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise SmolVMError(
            f"{path} cannot be removed: {error.strerror}; remove it by hand: rm -r {path}",
            {"path": str(path)},
        ) from error


def read_json(path: Path) -> Any:
    """The JSON in a cache file; None when it is missing or broken (a cache may be either)."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Write a cache file for ``read_json``."""
    write_atomically(path, json.dumps(value).encode())


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
