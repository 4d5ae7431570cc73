"""The cache of images: each built once, by whoever asks first, and whole or not at all.

::

    <cache>/<name>-<key>/          there whole, or not at all
        image.json                 ImageFacts
        digests.json               SHA-256 of what guests are made of
        vmlinux, vmlinux.initrd    kernel and initial RAM disk
        rootfs.ext4                the root disk, and its manifest beside it
    <cache>/<name>-<key>.lock      held by whoever builds it
    <cache>/imported/<name>-<recipe>.json   which image of another host stands for a recipe
    <cache>/debian/, alpine/       packages

The key is a hash of all that decides what the image is, the versions of packages and the key that
may log in included; a recipe's is one of what somebody asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pytest_smolvm.disks import note_digests, noted_digests
from pytest_smolvm.errors import ImageError, SmolVMError
from pytest_smolvm.process import Deadline
from pytest_smolvm.statedir import locked, make_private_dir, read_json, try_lock, write_json

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]

FACTS = "image.json"
_BUILD_TIMEOUT_S = 3600
_LEFTOVER_TIMEOUT_S = 10
_LEFTOVER_PAUSE_S = 0.05
_KEY_CHARS = 16
_FULL_BYTES = 1 << 20


class StalePackagesError(ImageError):
    """Packages that were known to be there cannot be had any more; the mirror may have newer."""


class ImageFacts(BaseModel):
    """What is known of an image as a whole."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    architecture: str
    created_at: float
    """Seconds since 1970."""
    origin: str = ""
    """What it was made from, in words."""
    recipe: str = ""
    """``recipe_key`` of what was asked for; empty: made by a release that did not say."""


class ImageCache:
    """The images in one directory."""

    def __init__(self, root: Path) -> None:
        self.root = make_private_dir(root)

    def find(self, name: str, inputs: Mapping[str, object]) -> Path | None:
        """The image of that name made from ``inputs`` (JSON), if it is there."""
        path = self._path(name, inputs)
        return path if path.is_dir() else None

    def find_imported(self, name: str, recipe: Mapping[str, object]) -> Path | None:
        """The image of another host that was made by the same recipe, if one was imported."""
        pin = self._pin(name, recipe_key(recipe))
        known = read_json(pin)
        if not isinstance(known, str) or Path(known).name != known:
            return None
        path = self.root / known
        if not path.is_dir():
            pin.unlink(missing_ok=True)  # it was removed
            return None
        _note_use(path)
        return path

    def adopt(self, image: Path) -> None:
        """Have an image that was imported stand for its recipe."""
        facts = ImageFacts.model_validate(read_json(image / FACTS))
        make_private_dir(self.root / "imported")
        write_json(self._pin(facts.name, facts.recipe), image.name)

    def get(
        self,
        name: str,
        inputs: Mapping[str, object],
        facts: ImageFacts,
        build: Callable[[Path, Path], None],
        progress: Progress,
    ) -> Path:
        """The image of that name made from ``inputs``; made now by ``build``, if need be.

        ``build`` is given two empty directories: one for what the image is to hold, one to work
        in. Raises ``ImageError``, ``OSError``, and whatever ``build`` raises; nothing is left then.
        """
        target = self._path(name, inputs)
        if target.is_dir():
            _note_use(target)
            _note_recipe(target, facts.recipe)
            return target
        self.sweep()
        with locked(
            target.with_name(f"{target.name}.lock"),
            operation="waiting for another process to build an image",
            timeout_s=_BUILD_TIMEOUT_S,
            on_wait=lambda: progress("another process is building it: waiting"),
        ):
            if target.is_dir():
                return target
            prefix = f".{target.name}."
            for leftover in self.root.glob(f"{prefix}*"):
                _remove_leftover(leftover)
            with tempfile.TemporaryDirectory(dir=self.root, prefix=prefix) as scratch:
                whole, work = Path(scratch, "image"), Path(scratch, "work")
                whole.mkdir()
                work.mkdir()
                with _full_disk_is_said(work):
                    build(whole, work)
                note_digests(whole, _files_of_guest(whole), noted_digests(whole))
                write_json(whole / FACTS, facts.model_dump())
                put_in_place(whole, target)
            progress("ready")
        return target

    def sweep(self) -> list[str]:
        """Remove what builds left that were killed; return the names removed."""
        swept = []
        for scratch in self.root.glob(".*.*/"):
            # Whoever builds, or removes, an image holds its lock meanwhile.
            lock = try_lock(self.root / f"{scratch.name[1:].rpartition('.')[0]}.lock")
            if lock is not None:
                _remove_leftover(scratch)
                lock.release()
                swept.append(scratch.name)
        return swept

    def _pin(self, name: str, recipe: str) -> Path:
        return self.root / "imported" / f"{name}-{recipe}.json"

    def _path(self, name: str, inputs: Mapping[str, object]) -> Path:
        return self.root / f"{name}-{_key_of([name, inputs])}"


@contextlib.contextmanager
def _full_disk_is_said(folder: Path) -> Iterator[None]:
    """Whatever a tool said that had no room: that there was none."""
    try:
        yield
    except (SmolVMError, OSError) as error:
        # Now: what was made so far goes next.
        if shutil.disk_usage(folder).free < _FULL_BYTES:
            raise ImageError(
                f"No space left on the disk with {folder.parents[1]}: make room there, or set "
                f"SMOLVM_STATE_DIR to a directory on another disk\n{error}"
            ) from error
        raise


def _note_recipe(image: Path, recipe: str) -> None:
    """Write down what an image was made of, if the release that made it did not."""
    known = read_json(image / FACTS)
    if isinstance(known, dict) and not known.get("recipe"):
        write_json(image / FACTS, {**known, "recipe": recipe})


def recipe_key(recipe: Mapping[str, object]) -> str:
    """A name for what was asked for (JSON), whatever it is made of on this host or another."""
    return _key_of(recipe)


def _key_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_KEY_CHARS]


def _note_use(image: Path) -> None:
    with contextlib.suppress(OSError):
        (image / FACTS).touch()  # for those who clear out: it is in use


def _files_of_guest(image: Path) -> list[str]:
    patterns = ("vmlinux*", "rootfs.ext4", "*.qcow2")
    return sorted(path.name for pattern in patterns for path in image.glob(pattern))


def facts_of(name: str, architecture: str, origin: str, recipe: Mapping[str, object]) -> ImageFacts:
    """The facts of an image that is made now."""
    return ImageFacts(
        name=name,
        architecture=architecture,
        created_at=time.time(),
        origin=origin,
        recipe=recipe_key(recipe),
    )


def check_space(folder: Path, wanted_bytes: int, what: str) -> None:
    """Raise ``ImageError`` unless there is room for ``what`` beside ``folder``."""
    free = shutil.disk_usage(folder).free
    if free < wanted_bytes:
        raise ImageError(
            f"{what} needs some {wanted_bytes >> 20} MiB, and {folder} has {free >> 20} MiB free: "
            "make room there, or set SMOLVM_STATE_DIR to a directory on another disk",
            {"free_bytes": free, "wanted_bytes": wanted_bytes},
        )


def _remove_leftover(folder: Path) -> None:
    """Remove what a build that was killed had made; its tools may still be writing there."""
    deadline = Deadline(_LEFTOVER_TIMEOUT_S)
    while True:
        try:
            shutil.rmtree(folder)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if deadline.passed():
                # In nobody's way: the next build tries again.
                logger.warning("%s is left of a build that was killed: %s", folder, error)
                return
        time.sleep(_LEFTOVER_PAUSE_S)


def put_in_place(whole: Path, target: Path) -> None:
    """Give a directory its name, under which it is there complete, or not at all."""
    for path in whole.iterdir():
        _sync(path)
    whole.replace(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
