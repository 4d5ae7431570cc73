"""ImageBuilder: every image built once, by whoever asks first, and whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from pytest_smolvm.errors import ImageError
from pytest_smolvm.images.debian import Progress
from pytest_smolvm.images.micro import MicroRecipe
from pytest_smolvm.keys import check_public_key, library_key_pair
from pytest_smolvm.limits import DEFAULT_IMAGE
from pytest_smolvm.process import Deadline, ToolError
from pytest_smolvm.statedir import default_state_dir, locked, make_private_dir
from pytest_smolvm.store import Store

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_BUILD_TIMEOUT_S = 1800
_LEFTOVER_TIMEOUT_S = 10
_LEFTOVER_PAUSE_S = 0.05
_SMALLEST_ROOTFS_MB = 32
_LARGEST_ROOTFS_MB = 1 << 20


def print_progress(message: str) -> None:
    """The progress of a program with no screen of its own: lines on standard error."""
    print(f"pytest-smolvm: {message}", file=sys.stderr, flush=True)  # noqa: T201


class ImageBuilder:
    """Builds images and keeps them in ``cache_dir`` (default: ``images`` in the state dir).

    ``progress`` is called with a line of text at each step of a build (default:
    print it on standard error); an image that is there already says nothing.
    """

    def __init__(
        self, cache_dir: Path | str | None = None, *, progress: Progress | None = None
    ) -> None:
        state = default_state_dir()
        self.cache_dir = make_private_dir(Path(cache_dir) if cache_dir else state / "images")
        self._state = state
        self._progress = progress if progress is not None else print_progress

    def build(self, name: str) -> tuple[Path, Path]:
        """The built-in image called ``name``: kernel and root disk."""
        if name != DEFAULT_IMAGE:
            raise ImageError(
                f"there is no image called {name!r}: the images are {DEFAULT_IMAGE!r}; your own "
                "kernel and root disk are given by path",
                {"name": name, "known": [DEFAULT_IMAGE]},
            )
        return self.build_micro_ssh_key()

    def build_micro_ssh_key(
        self, public_key: str | None = None, name: str = "micro", rootfs_size_mb: int = 128
    ) -> tuple[Path, Path]:
        """The image ``micro`` (busybox and dropbear on a Debian kernel), built if need be.

        ``public_key``, one line in OpenSSH's format, is the key that may log in as
        root; None: the pair that the library keeps for itself. ``rootfs_size_mb`` is
        the root disk's size in MiB, 32 or more. Returns the paths of kernel and root
        disk; the initial RAM disk lies beside the kernel. Raises ``ImageError``.
        """
        if not _NAME.fullmatch(name):
            raise ImageError(
                f"{name!r} is no name for an image: use lowercase letters, digits, dots, hyphens "
                "and underscores, such as 'my-micro'"
            )
        if not _SMALLEST_ROOTFS_MB <= rootfs_size_mb <= _LARGEST_ROOTFS_MB:
            raise ImageError(
                f"rootfs_size_mb={rootfs_size_mb} is out of range: give {_SMALLEST_ROOTFS_MB} to "
                f"{_LARGEST_ROOTFS_MB} MiB"
            )
        try:
            key = (
                library_key_pair(Store(self._state)).public_key
                if public_key is None
                else check_public_key(public_key)
            )
        except ValueError as error:
            raise ImageError(str(error)) from None
        started = time.monotonic()

        def progress(message: str) -> None:
            self._progress(f"image {name}: {message} [{time.monotonic() - started:.1f} s]")

        try:
            recipe = MicroRecipe(self.cache_dir / "debian", key, rootfs_size_mb, progress)
            digest = hashlib.sha256(
                json.dumps([name, recipe.inputs()], sort_keys=True).encode()
            ).hexdigest()
            target = self.cache_dir / f"{name}-{digest[:16]}"
            if not target.is_dir():
                self._build_once(recipe, target, name, progress)
        except ToolError as error:
            raise ImageError(f"the image {name!r} cannot be built: {error.message}") from error
        except OSError as error:
            raise ImageError(
                f"the image {name!r} cannot be built in {self.cache_dir}: {error}"
            ) from error
        return target / "vmlinux", target / "rootfs.ext4"

    def _build_once(self, recipe: MicroRecipe, target: Path, name: str, progress: Progress) -> None:
        with locked(
            self.cache_dir / f"{target.name}.lock",
            operation="waiting for another process to build an image",
            timeout_s=_BUILD_TIMEOUT_S,
            on_wait=lambda: progress("another process is building it: waiting"),
        ):
            if target.is_dir():
                return
            prefix = f".{target.name}."
            for leftover in self.cache_dir.glob(f"{prefix}*"):
                _remove_leftover(leftover)
            with tempfile.TemporaryDirectory(dir=self.cache_dir, prefix=prefix) as scratch:
                whole, work = Path(scratch, "image"), Path(scratch, "work")
                whole.mkdir()
                work.mkdir()
                recipe.build(whole, work, name)
                for path in whole.iterdir():
                    _sync(path)
                # A directory appears under its name complete, or not at all.
                whole.replace(target)
            progress("ready")


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
