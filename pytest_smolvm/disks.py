"""Disks: isolated, shared and retained.

*isolated*: a qcow2 overlay on the root image, which is opened read-only. Its
cost does not depend on the image's size, and the image is never written to.

*shared*: the root image itself, read-only, for any number of VMs at once.
Read-only rather than "writes that are thrown away", because that is what an
isolated disk already is: a write to a shared disk fails where it is made,
with EROFS, instead of being lost later.

*retained*: an isolated disk kept after ``delete()``. It only makes sense over
the very bytes it was made for, so their SHA-256 is kept with it.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pytest_smolvm.errors import ImageError
from pytest_smolvm.process import ToolError, find_tool, run_tool
from pytest_smolvm.statedir import make_private_dir, read_json, write_json

ImageFormat = Literal["raw", "qcow2"]
_QCOW2_MAGIC = b"QFI\xfb"
_HASH_BLOCK = 1 << 20


@dataclass(frozen=True)
class Image:
    """A file with a disk's contents."""

    path: Path
    format: ImageFormat


@dataclass(frozen=True)
class Disk:
    """What a machine boots from: ``image``, over ``backing`` if it is an overlay."""

    image: Image
    backing: Image | None = None
    read_only: bool = False


def image_format(path: Path) -> ImageFormat:
    """Raw or qcow2, by the file's first bytes.

    An empty file, an unreadable one, and a qcow2 that refers to other files
    (its guest could read the host's files through them) are an ``ImageError``.
    """
    try:
        with path.open("rb") as file:
            header = file.read(104)
    except OSError as error:
        raise ImageError(
            f"the disk image {path} cannot be read: {error.strerror}", {"path": str(path)}
        ) from error
    if not header:
        raise ImageError(f"the disk image {path} is empty", {"path": str(path)})
    if not header.startswith(_QCOW2_MAGIC):
        return "raw"
    if len(header) < 72:
        raise ImageError(f"the qcow2 image {path} ends within its header", {"path": str(path)})
    # docs/interop/qcow2.txt in QEMU's sources: bytes 8-15 are the offset of the
    # backing file's name; incompatible feature bit 2 says "external data file".
    (version, backing_offset) = struct.unpack_from(">IQ", header, 4)
    features = struct.unpack_from(">Q", header, 72)[0] if version >= 3 and len(header) >= 80 else 0
    if backing_offset or features & 4:
        raise ImageError(
            f"the qcow2 image {path} refers to another file, which is refused: a guest could read "
            f"the host's files that way; flatten it: qemu-img convert -O qcow2 {path} flat.qcow2",
            {"path": str(path)},
        )
    return "qcow2"


def shared_disk(rootfs: Path) -> Disk:
    """The image itself, for any number of VMs at once; none of them can write to it."""
    return Disk(Image(rootfs, image_format(rootfs)), read_only=True)


def create_overlay(rootfs: Path, overlay: Path) -> Disk:
    """A new isolated disk over ``rootfs``."""
    base = Image(rootfs, image_format(rootfs))
    qemu_img = find_tool("qemu-img", "qemu-utils")
    try:
        run_tool(
            [
                *(qemu_img, "create", "-q", "-f", "qcow2"),
                *("-F", base.format, "-b", str(rootfs.absolute()), str(overlay)),
            ],
            timeout_s=60,
        )
    except ToolError as error:
        raise ImageError(f"no disk could be made over {rootfs}: {error.message}") from error
    return Disk(Image(overlay, "qcow2"), backing=base)


def reopen_overlay(rootfs: Path, overlay: Path) -> Disk:
    """An isolated disk that was kept, over the image it was made for."""
    return Disk(Image(overlay, "qcow2"), backing=Image(rootfs, image_format(rootfs)))


def fingerprint(path: Path, cache: Path) -> str:
    """SHA-256 of a file's contents.

    Remembered in ``cache`` for as long as device, inode, size and the times of
    the last change of contents and inode stay the same: the last of these
    cannot be set back, so a changed file is never taken for the old one.
    """
    facts = path.stat()
    identity = [
        *(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns),
    ]
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:24]
    memory = make_private_dir(cache / "fingerprints") / f"{name}.json"
    known = read_json(memory)
    if isinstance(known, dict) and known.get("identity") == identity:
        return str(known["sha256"])
    digest = _hash(path)
    write_json(memory, {"path": str(path), "identity": identity, "sha256": digest})
    return digest


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
