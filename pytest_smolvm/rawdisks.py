"""Raw disks, for backends that know no other: an image flattened once, a copy for each VM.

A copy shares its blocks with the image where the file system can do that (FICLONE: Btrfs, XFS);
else it takes the image's data, and leaves out its holes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from pathlib import Path

from pytest_smolvm.disks import Disk, Image, chain_of, copy_sparsely, fingerprint_of_image
from pytest_smolvm.errors import ImageError
from pytest_smolvm.process import ToolError, find_tool, run_tool
from pytest_smolvm.statedir import locked, make_private_dir
from pytest_smolvm.store import Store

_FICLONE = 0x40049409  # linux/fs.h
_FLATTEN_TIMEOUT_S = 600.0
_KEPT_DAYS = 7.0
_CANNOT_SHARE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)


def raw_image(rootfs: Path, store: Store) -> Path:
    """``rootfs`` as one raw file: itself, or what was made of it, once per content.

    Raises ``ImageError`` where that takes ``qemu-img``, and there is none.
    """
    image, *below = chain_of(rootfs)
    if image.format == "raw" and not below:
        return rootfs
    folder = make_private_dir(store.cache / "flat")
    flat = folder / f"{fingerprint_of_image(rootfs, store.cache)}.raw"
    with locked(
        folder / f"{flat.stem}.lock",
        operation=f"waiting for another process to flatten {rootfs}",
        timeout_s=_FLATTEN_TIMEOUT_S,
    ):
        if not flat.exists():
            _sweep(folder)
            try:
                flatten(rootfs, flat)
            except ToolError as error:
                raise ImageError(
                    f"{rootfs} cannot be made into the raw disk that this backend takes: "
                    f"{error.message}"
                ) from error
    os.utime(flat)  # for the sweep: it is in use
    return flat


def copy_disk(source: Path, target: Path) -> None:
    """Have ``target`` hold what ``source`` does; neither sees what is written to the other."""
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with source.open("rb") as reader:
            fcntl.ioctl(descriptor, _FICLONE, reader.fileno())
    except OSError as error:
        if error.errno not in _CANNOT_SHARE:
            raise
    else:
        return
    finally:
        os.close(descriptor)
    copy_sparsely(source, target)


def create_copy(rootfs: Path, target: Path, store: Store) -> Disk:
    """A new isolated disk that holds what ``rootfs`` does."""
    source = raw_image(rootfs, store)
    try:
        copy_disk(source, target)
    except OSError as error:
        target.unlink(missing_ok=True)
        raise ImageError(
            f"no disk could be made of {rootfs}: {target} cannot be written: {error.strerror}"
        ) from error
    return Disk(Image(target, "raw"))


def flatten(rootfs: Path, flat: Path) -> None:
    """Write all that an image of layers holds as one raw file; whole, or not at all."""
    node: dict[str, object] | None = None
    for image in reversed(chain_of(rootfs)):
        file = {"driver": "file", "filename": str(image.path.absolute()), "read-only": True}
        backing = {"backing": node} if image.format == "qcow2" else {}
        node = {"driver": image.format, "read-only": True, "file": file, **backing}
    scratch = flat.with_name(f".{flat.name}.tmp")
    qemu_img = find_tool("qemu-img", "qemu-utils")
    source = f"json:{json.dumps(node)}"
    try:
        run_tool(
            [qemu_img, "convert", "-O", "raw", source, str(scratch)], timeout_s=_FLATTEN_TIMEOUT_S
        )
        scratch.chmod(0o600)
        scratch.replace(flat)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _sweep(folder: Path) -> None:
    """Remove what was not used for days. VMs have copies of their own."""
    for flat in folder.glob("*.raw"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - flat.stat().st_mtime > _KEPT_DAYS * 86400:
                flat.unlink()
