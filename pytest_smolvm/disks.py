"""Disks: isolated, shared and retained; layers between a disk and its image.

*isolated*: a qcow2 overlay on the root image, which is opened read-only. Its
cost does not depend on the image's size, and the image is never written to.

*shared*: the root image itself, read-only, for any number of VMs at once.
Read-only rather than "writes that are thrown away", because that is what an
isolated disk already is: a write to a shared disk fails where it is made,
with EROFS, instead of being lost later.

*retained*: an isolated disk kept after ``delete()``. It only makes sense over
the very bytes it was made for, so their SHA-256 is kept with it.

*layer*: the disk of a guest as it was when a template was made of it. Never
written to; it lies in every directory whose disk is over it, as a hard link.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pytest_smolvm import qcow2
from pytest_smolvm.errors import ImageError
from pytest_smolvm.statedir import make_private_dir, read_json, write_json

ImageFormat = Literal["raw", "qcow2"]
_HASH_BLOCK = 1 << 20


@dataclass(frozen=True)
class Image:
    """A file with a disk's contents."""

    path: Path
    format: ImageFormat


@dataclass(frozen=True)
class Disk:
    """What a machine boots from: ``image``, over ``backing`` if it is an overlay.

    ``backing`` has the nearest first: layers, then the root image.
    """

    image: Image
    backing: tuple[Image, ...] = ()
    read_only: bool = False


def image_format(path: Path) -> ImageFormat:
    """Raw or qcow2, by the file's first bytes.

    An empty file, an unreadable one, and a qcow2 that refers to other files
    (its guest could read the host's files through them) are an ``ImageError``.
    """
    return _look_at(path)[0]


def _look_at(path: Path) -> tuple[ImageFormat, int]:
    """Format and size in bytes, as the guest sees it."""
    try:
        with path.open("rb") as file:
            head = file.read(104)
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise ImageError(
            f"the disk image {path} cannot be read: {error.strerror}", {"path": str(path)}
        ) from error
    if not head:
        raise ImageError(f"the disk image {path} is empty", {"path": str(path)})
    if not head.startswith(qcow2.MAGIC):
        return "raw", size
    header = qcow2.read_header(head)
    if header is None:
        raise ImageError(f"the qcow2 image {path} ends within its header", {"path": str(path)})
    if header.refers_to_others:
        raise ImageError(
            f"the qcow2 image {path} refers to another file, which is refused: a guest could read "
            f"the host's files that way; flatten it: qemu-img convert -O qcow2 {path} flat.qcow2",
            {"path": str(path)},
        )
    return "qcow2", header.virtual_size


def shared_disk(rootfs: Path) -> Disk:
    """The image itself, for any number of VMs at once; none of them can write to it."""
    return Disk(Image(rootfs, image_format(rootfs)), read_only=True)


def create_overlay(rootfs: Path, overlay: Path, layers: Sequence[Path] = ()) -> Disk:
    """A new isolated disk over ``rootfs``, with ``layers`` between, the nearest first.

    Layers lie in the overlay's own directory.
    """
    image_format, size = _look_at(rootfs)
    backing = (str(rootfs.absolute()), image_format)
    try:
        if layers:
            backing = (layers[0].name, "qcow2")
            with layers[0].open("rb") as file:
                header = qcow2.read_header(file.read(104))
            # A guest's disk may have grown since the image was made.
            size = header.virtual_size if header else size
        qcow2.write_overlay(overlay, *backing, size)
    except OSError as error:
        raise ImageError(
            f"no disk could be made over {rootfs}: {overlay} cannot be written: {error.strerror}"
        ) from error
    return reopen_overlay(rootfs, overlay, layers)


def reopen_overlay(rootfs: Path, overlay: Path, layers: Sequence[Path] = ()) -> Disk:
    """An isolated disk that was kept, over the image and the layers it was made for."""
    between = tuple(Image(path, "qcow2") for path in layers)
    return Disk(Image(overlay, "qcow2"), (*between, Image(rootfs, image_format(rootfs))))


def link_layer(layer: Path, directory: Path) -> Path:
    """Have ``layer`` in ``directory`` too, where it stays whatever becomes of the first."""
    target = directory / layer.name
    try:
        target.hardlink_to(layer)
    except FileExistsError:
        pass
    except OSError:
        # Another file system, or one without links.
        copy_sparsely(layer, target)
    return target


def copy_sparsely(source: Path, target: Path) -> None:
    """Copy a file's data and leave its holes; only this user may read the copy."""
    with source.open("rb") as reader:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as writer:
            size = os.fstat(reader.fileno()).st_size
            writer.truncate(size)
            for start, end in data_extents(reader.fileno(), size):
                _copy_range(reader.fileno(), descriptor, start, end)


def data_extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file holds data rather than holes: lseek(2), SEEK_DATA."""
    position = 0
    while position < size:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        position = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, position


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        done = 0
        if hasattr(os, "copy_file_range"):  # Linux
            try:
                done = os.copy_file_range(source, target, end - start, start, start)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
        if not done:
            done = os.pwrite(target, os.pread(source, min(_HASH_BLOCK, end - start), start), start)
        start += done


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
