"""What lies in the cache of images, who uses it, and what may go."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from pytest_smolvm.errors import ImageError
from pytest_smolvm.images.cache import FACTS, ImageFacts
from pytest_smolvm.records import read_record
from pytest_smolvm.statedir import BLOCK_BYTES, allocated_bytes, read_json, remove_tree, try_lock
from pytest_smolvm.store import Store

_DAY_S = 86400
_OWN = ("debian", "alpine", "imported", "logs")  # folders of the cache that are no images


@dataclass(frozen=True)
class ShelvedImage:
    """One image in the cache."""

    path: Path
    facts: ImageFacts
    age_s: float
    """Seconds since it was made."""
    unused_s: float
    """Seconds since it was last asked for."""
    size_bytes: int
    """What it takes of the disk; what other images have links to is counted with each."""
    own_bytes: int
    """What would become free if it went alone."""
    used_by: list[str] = field(default_factory=list)
    """The VMs, live and kept, whose disk lies over it."""

    @property
    def key(self) -> str:
        """Its name with the hash of what it was made from; no other image is called so."""
        return self.path.name


def shelf(cache: Path, store: Store) -> list[ShelvedImage]:
    """All images of a cache, sorted by name, the newest first."""
    users = _users(store)
    found = []
    for path in cache.glob("[!.]*/"):
        if path.name in _OWN or not any(path.glob("rootfs.*")):
            continue
        facts = _facts_of(path)
        used_at = max(facts.created_at, _used_at(path))
        found.append(
            ShelvedImage(
                path=path,
                facts=facts,
                age_s=time.time() - facts.created_at,
                unused_s=time.time() - used_at,
                size_bytes=allocated_bytes(path),
                own_bytes=allocated_bytes(path, linked=False),
                used_by=users.get(path.resolve(), []),
            )
        )
    return sorted(found, key=lambda image: (image.facts.name, image.age_s))


def find(images: list[ShelvedImage], name: str) -> list[ShelvedImage]:
    """Those called ``name``: by their name, or one by its key. ``ImageError`` if none is."""
    found = [image for image in images if name in (image.facts.name, image.key)]
    if not found:
        known = sorted({image.facts.name for image in images})
        raise ImageError(
            f"there is no image {name!r} in the cache: there are {', '.join(known) or 'none'} "
            "(pytest-smolvm image list)",
            {"name": name, "known": known},
        )
    return found


def remove(image: ShelvedImage) -> None:
    """Remove an image. ``ImageError`` if a VM's disk lies over it."""
    if image.used_by:
        raise ImageError(
            f"the image {image.key} is used by {', '.join(image.used_by)}, whose disk would be "
            "lost without it: remove those first (pytest-smolvm rm VM)",
            {"image": image.key, "used_by": image.used_by},
        )
    lock = try_lock(image.path.with_name(f"{image.path.name}.lock"))
    if lock is None:
        raise ImageError(f"the image {image.key} is being built right now: try again later")
    try:
        # Out of sight at once: nobody is to begin with half of it.
        aside = image.path.with_name(f".{image.path.name}.removed")
        shutil.rmtree(aside, ignore_errors=True)
        image.path.rename(aside)
        remove_tree(aside)
    finally:
        lock.release()
        image.path.with_name(f"{image.path.name}.lock").unlink(missing_ok=True)


def to_prune(
    images: list[ShelvedImage], keep_days: float, max_bytes: int | None
) -> list[ShelvedImage]:
    """What was not asked for in ``keep_days`` days, and the longest unused beyond ``max_bytes``.

    Nothing that a VM's disk lies over.
    """
    free = sorted(
        (image for image in images if not image.used_by), key=lambda image: -image.unused_s
    )
    gone = [image for image in free if image.unused_s > keep_days * _DAY_S]
    if max_bytes is not None:
        for image in free:
            if _bytes_of(other for other in images if other not in gone) <= max_bytes:
                break
            if image not in gone:
                gone.append(image)
    return gone


def _bytes_of(images: Iterable[ShelvedImage]) -> int:
    """What images take of the disk together; what several have links to counts once."""
    sizes = {}
    for image in images:
        for path in image.path.iterdir():
            facts = path.lstat()
            sizes[facts.st_ino] = facts.st_blocks * BLOCK_BYTES
    return sum(sizes.values())


def _facts_of(path: Path) -> ImageFacts:
    try:
        return ImageFacts.model_validate(read_json(path / FACTS))
    except ValidationError:  # made by a release that wrote none
        name = path.name.rpartition("-")[0]
        return ImageFacts(name=name, architecture="", created_at=path.stat().st_mtime)


def _used_at(path: Path) -> float:
    try:
        return (path / FACTS).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _users(store: Store) -> dict[Path, list[str]]:
    found: dict[Path, list[str]] = {}
    for directory in sorted(store.vms.iterdir()):
        record = read_record(directory)
        rootfs = record.config.get("rootfs_path") if record else None
        if rootfs:
            found.setdefault(Path(rootfs).parent.resolve(), []).append(directory.name)
    return found
