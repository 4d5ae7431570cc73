"""Templates: guests that booted once, kept so that any number of VMs can start from there.

::

    <state>/templates/<key>/       there whole, or not at all
        template.json              TemplateFacts
        memory                     the guest's memory: sparse, mapped copy-on-write by each VM
        state                      its devices
        layer-<key>.qcow2          its disk, over the root image or the layers beside it; or
        layer-<key>.raw            all of its disk
        console.log                what it had written to its console
    <state>/templates/<key>.lock   held by whoever makes it

The key is a hash of all that decides what is in it. A template of ``SmolVM.snapshot`` has a random
one, and goes with the process that made it.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import platform
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from pytest_smolvm.backends.base import Backend, MachineSpec
from pytest_smolvm.config import VMConfig
from pytest_smolvm.disks import data_extents, fingerprint, fingerprint_of_image
from pytest_smolvm.errors import OperationTimeoutError, SmolVMError
from pytest_smolvm.statedir import (
    allocated_bytes,
    locked,
    make_private_dir,
    read_json,
    remove_tree,
    try_lock,
    write_json,
)
from pytest_smolvm.store import Store

FORMAT = 1
"""Raised whenever a template of before could not be used, or would give another guest."""

MAX_AGE_DAYS = 14
MAX_TOTAL_BYTES = 8 << 30
_IN_USE_S = 3600.0
_FACTS = "template.json"
_OWNED = "run-"
_BLOCK = 1 << 16
_ZEROS = bytes(_BLOCK)


class TemplateError(SmolVMError):
    """A template cannot be used, or not be made; its VM boots instead."""


class FileFacts(BaseModel):
    """What a file must be for its template to be whole."""

    model_config = ConfigDict(frozen=True)

    size: int
    crc32: int
    """Of the blocks that are not all zeros, and where they lie."""


class TemplateFacts(BaseModel):
    """What is known of a template."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    key: str
    vm_id: str
    """The VM that it was made of."""
    config: dict[str, Any]
    ssh_user: str
    ssh_key_path: str | None
    accelerator: str
    made_by: list[str]
    """The backend's description of the machine."""
    layers: list[str]
    """The nearest first."""
    disk: list[str | int]
    """The image under them: path, size, time of the last change (ns)."""
    fresh: bool = False
    """Whether nothing had happened in the guest since it booted."""
    files: dict[str, FileFacts] = {}


@dataclass(frozen=True)
class Template:
    """A guest as it was at one moment, for any number of VMs to start from.

    It is made by ``SmolVM.snapshot`` and used by ``SmolVM.from_template`` and ``SmolVM.restore``.
    ``delete()`` removes it; else it goes with the process that made it.
    """

    path: Path
    facts: TemplateFacts = field(repr=False)

    @property
    def key(self) -> str:
        """A name for it, unlike that of any other template."""
        return self.facts.key

    @property
    def config(self) -> VMConfig:
        """The configuration of the VM that it was made of."""
        return VMConfig.model_validate(self.facts.config)

    @property
    def layers(self) -> list[Path]:
        """The disks under one that starts from it, the nearest first."""
        return [self.path / name for name in self.facts.layers]

    def delete(self) -> None:
        """Remove it. VMs that were started from it live on."""
        remove_tree(self.path)


class Templates:
    """The templates of one state directory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.root = make_private_dir(store.root / "templates")

    def find(self, key: str) -> Template | None:
        """The template of that key, if there is one. ``TemplateError`` if it is not whole."""
        path = self.root / key
        if not path.is_dir():
            return None
        template = _read(path)
        _check_files(template)
        with contextlib.suppress(OSError):
            os.utime(path / _FACTS)  # for the sweep: it is in use
        return template

    @contextlib.contextmanager
    def making(self, key: str, timeout_s: float, on_wait: Callable[[], object]) -> Iterator[bool]:
        """Hold the right to make the template of that key; False: another had it, and is done.

        Waits while another process makes it, for ``timeout_s`` seconds at most; then, too, it is
        False.
        """
        waited = False

        def note() -> None:
            nonlocal waited
            waited = True
            on_wait()

        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(
                    locked(
                        self.root / f"{key}.lock",
                        operation="waiting for another process to make a template",
                        timeout_s=timeout_s,
                        on_wait=note,
                    )
                )
            except OperationTimeoutError:
                waited = True
            if waited:
                # Whoever waited must not have the others wait for it in turn.
                stack.close()
            yield not waited

    def make(self, key: str, write: Callable[[Path], TemplateFacts]) -> Template:
        """Have ``write`` fill a directory, which becomes the template of that key."""
        self.sweep()
        for leftover in self.root.glob(f".{key}.*"):
            remove_tree(leftover)
        return self._make(self.root / key, write)

    def make_owned(self, write: Callable[[Path], TemplateFacts]) -> Template:
        """Like ``make``, for a template that goes with this process."""
        with self._store.guarded():
            folder = make_private_dir(self.root / f"{_OWNED}{os.getpid()}-{secrets.token_hex(4)}")
            lock = try_lock(folder / "lock")
            assert lock is not None  # noqa: S101 - nobody else knows of it
            _owned[os.getpid(), folder] = lock
        return self._make(folder / "template", write)

    def _make(self, path: Path, write: Callable[[Path], TemplateFacts]) -> Template:
        scratch = make_private_dir(path.with_name(f".{path.name}.{secrets.token_hex(4)}"))
        try:
            facts = write(scratch)
            names = [entry.name for entry in scratch.iterdir()]
            files = {name: _measure(scratch / name) for name in names}
            facts = facts.model_copy(update={"files": files})
            write_json(scratch / _FACTS, facts.model_dump(mode="json"))
            scratch.replace(path)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise TemplateError(
                f"nothing can be written to {self.root}: {error.strerror}", {"path": str(path)}
            ) from error
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        _checked.add(_identity(path))
        return Template(path, facts)

    def discard(self, key: str) -> None:
        """Remove a template that proved to be of no use."""
        path = self.root / key
        aside = path.with_name(f".{key}.{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):
            path.rename(aside)
            remove_tree(aside)

    def sweep(self) -> list[str]:
        """Remove what was not used for long, or is too much, and what dead processes left.

        Returns what was removed. One that was used within the last hour stays.
        """
        swept = self.sweep_leftovers()
        found = []
        for facts in self.root.glob(f"[!.]*/{_FACTS}"):
            with contextlib.suppress(FileNotFoundError):  # another process sweeps, too
                found.append((facts.stat().st_mtime, allocated_bytes(facts.parent), facts.parent))
        found.sort()
        total, now = sum(size for _, size, _ in found), time.time()
        for used_at, size, path in found:
            age_s = now - used_at
            too_old = age_s > MAX_AGE_DAYS * 86400
            too_much = total > MAX_TOTAL_BYTES and age_s > _IN_USE_S
            if too_old or too_much:
                self.discard(path.name)
                total -= size
                swept.append(path.name)
        return swept

    def sweep_leftovers(self) -> list[str]:
        """Remove what dead processes left: their own templates, and unfinished ones."""
        swept = []
        with self._store.guarded():
            for folder in self.root.glob(f"{_OWNED}*"):
                if (os.getpid(), folder) not in _owned and _is_free(folder / "lock"):
                    remove_tree(folder)
                    swept.append(folder.name)
        for scratch in self.root.glob(".*"):
            # Whoever makes one holds the lock meanwhile.
            if _is_free(self.root / f"{scratch.name.split('.')[1]}.lock"):
                remove_tree(scratch)
                swept.append(scratch.name)
        return swept


_shared: dict[tuple[int, Path], Templates] = {}


def shared_templates(store: Store) -> Templates:
    """The templates of a store; what others left of theirs is removed once per process."""
    key = (os.getpid(), store.root)
    templates = _shared.get(key)
    if templates is None or not templates.root.is_dir():
        templates = _shared[key] = Templates(store)
        templates.sweep_leftovers()
    return templates


_owned: dict[tuple[int, Path], FileLock] = {}
"""Directories of templates that go with this process, and the locks that say so."""
_checked: set[tuple[Any, ...]] = set()
"""Templates whose every byte this process has read, or written."""


@atexit.register
def _release_owned() -> None:
    """Remove the templates that go with this process. A forked child has none of its parent's."""
    for (pid, folder), lock in list(_owned.items()):
        if pid == os.getpid():
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()


def base_key(config: VMConfig, backend: Backend, spec: MachineSpec, store: Store) -> str:
    """The key of the template of a configuration that has just booted.

    By content, for whatever is read from files.
    """
    initrd = config.effective_initrd_path()
    facts: list[object] = [
        FORMAT,
        *backend.describe(spec),
        fingerprint(config.kernel_path, store.cache),
        fingerprint_of_image(config.rootfs_path, store.cache),
        fingerprint(initrd, store.cache) if initrd else None,
    ]
    if backend.accelerator != "tcg":
        facts.append(_host_processor())
    return _hash(facts)


def prepared_key(base: str, config: VMConfig, preparation: str) -> str:
    """The key of a template in which something was prepared, over that of the booted one."""
    return _hash([base, sorted(config.env_vars.items()), preparation])


def _hash(facts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _host_processor() -> list[str]:
    """What a saved state depends on where guests see the host's own processor."""
    wanted = ("model name", "flags", "microcode", "Features", "CPU part", "CPU implementer")
    lines: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in wanted:
                lines.setdefault(name.strip(), value.strip())
    return [platform.machine(), *(f"{name}: {value}" for name, value in sorted(lines.items()))]


def _read(path: Path) -> Template:
    try:
        facts = TemplateFacts.model_validate(read_json(path / _FACTS))
    except ValidationError:
        raise TemplateError(f"the template {path.name} has no {_FACTS} that can be read") from None
    return Template(path, facts)


def _identity(path: Path) -> tuple[Any, ...]:
    facts = path.stat()
    return path, facts.st_dev, facts.st_ino


def _check_files(template: Template) -> None:
    """Raise unless each file is what it was: its size always, its contents once per process."""
    thoroughly = _identity(template.path) not in _checked
    for name, wanted in template.facts.files.items():
        path = template.path / name
        try:
            whole = path.stat().st_size == wanted.size
            if whole and thoroughly:
                whole = _measure(path) == wanted
        except OSError as error:
            raise TemplateError(
                f"the template {template.key} cannot be read: {name}: {error.strerror}"
            ) from None
        if not whole:
            raise TemplateError(f"the template {template.key} is damaged: {name} has changed")
    _checked.add(_identity(template.path))


def _measure(path: Path) -> FileFacts:
    checksum, done = 0, 0
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for start, end in data_extents(file.fileno(), size):
            for offset in range(max(done, start - start % _BLOCK), end, _BLOCK):
                block = os.pread(file.fileno(), _BLOCK, offset)
                # Some file systems fill holes that are looked at: zeros are never counted.
                if block != _ZEROS[: len(block)]:
                    checksum = zlib.crc32(offset.to_bytes(8, "little"), checksum)
                    checksum = zlib.crc32(block, checksum)
                done = offset + _BLOCK
    return FileFacts(size=size, crc32=checksum)


def _is_free(lock_path: Path) -> bool:
    lock = try_lock(lock_path)
    if lock is not None:
        lock.release()
    return lock is not None
