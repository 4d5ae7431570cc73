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

An image may be one of layers, too: a qcow2 file with a list beside it of what it lies over, in
the same directory. Such a list is only written by this library.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pytest_smolvm import qcow2
from pytest_smolvm.errors import ImageError
from pytest_smolvm.statedir import make_private_dir, read_json, write_json

ImageFormat = Literal["raw", "qcow2"]
_LARGEST_DISK_BYTES = 1 << 51  # what QEMU's limit for a table of clusters comes to
_HASH_BLOCK = 1 << 20
DIGESTS = "digests.json"


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
    One whose layers are known is not taken to refer to anything: see ``chain_of``.
    """
    return _look_at(path)[0]


def disk_size(path: Path) -> int:
    """How large a disk image is for its guest, in bytes."""
    return _look_at(path)[1]


def size_of(disk: Disk) -> int:
    """How large the disk of a machine is for its guest, in bytes."""
    return _size_and_header(disk.image.path)[0]


def chain_of(rootfs: Path) -> tuple[Image, ...]:
    """A root image, and what it lies over, the nearest first."""
    listed = read_json(_list_of_layers(rootfs))
    names = listed if isinstance(listed, list) else []
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ImageError(
            f"{_list_of_layers(rootfs)} is not a list of names in its directory: build the image "
            "anew",
            {"path": str(rootfs)},
        )
    below = [rootfs.with_name(name) for name in names]
    over = [Image(path, "raw" if path.suffix == ".ext4" else "qcow2") for path in below]
    return (Image(rootfs, image_format(rootfs)), *over)


def write_list_of_layers(rootfs: Path, below: Sequence[str]) -> None:
    """Say that the image ``rootfs`` lies over those files of its directory, the nearest first."""
    write_json(_list_of_layers(rootfs), list(below))


def _list_of_layers(rootfs: Path) -> Path:
    return rootfs.with_name(f"{rootfs.name}.layers.json")


def _look_at(path: Path) -> tuple[ImageFormat, int]:
    """Format and size in bytes, as the guest sees it."""
    size, header = _size_and_header(path)
    if header is None:
        return "raw", size
    if header.refers_to_others and not _list_of_layers(path).exists():
        raise ImageError(
            f"the qcow2 image {path} refers to another file, which is refused: a guest could read "
            f"the host's files that way; flatten it: qemu-img convert -O qcow2 {path} flat.qcow2",
            {"path": str(path)},
        )
    return "qcow2", size


def _size_and_header(path: Path) -> tuple[int, qcow2.Header | None]:
    """Size in bytes, as the guest sees it, and the header of a qcow2 file."""
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
        return size, None
    header = qcow2.read_header(head)
    if header is None:
        raise ImageError(f"the qcow2 image {path} ends within its header", {"path": str(path)})
    if header.virtual_size > _LARGEST_DISK_BYTES:
        raise ImageError(
            f"the qcow2 image {path} says that its disk has {header.virtual_size} bytes: it is "
            f"damaged, or made to do harm",
            {"path": str(path)},
        )
    return header.virtual_size, header


def shared_disk(rootfs: Path) -> Disk:
    """The image itself, for any number of VMs at once; none of them can write to it."""
    image, *below = chain_of(rootfs)
    return Disk(image, tuple(below), read_only=True)


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
    return Disk(Image(overlay, "qcow2"), (*between, *chain_of(rootfs)))


def link_layer(layer: Path, directory: Path, name: str | None = None) -> Path:
    """Have ``layer`` in ``directory`` too, where it stays whatever becomes of the first.

    ``name``: what it is called there; None: the same.
    """
    target = directory / (name or layer.name)
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

    A file of an image has it written down beside it: see ``note_digests``. That of another is
    remembered in ``cache`` for as long as device, inode, size and the times of
    the last change of contents and inode stay the same: the last of these
    cannot be set back, so a changed file is never taken for the old one.
    """
    facts = path.stat()
    noted = read_json(path.with_name(DIGESTS))
    if isinstance(noted, dict) and noted.get(path.name, [])[:2] == [
        facts.st_size,
        facts.st_mtime_ns,
    ]:
        return str(noted[path.name][2])
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


def note_digests(folder: Path, names: Iterable[str], known: Mapping[str, Any]) -> None:
    """Write down the SHA-256 of files that are not to change, for ``fingerprint``.

    ``known``: what was written down in the directory that some of them are linked from.
    """
    noted = {}
    for name in names:
        facts = (folder / name).stat()
        what = [facts.st_size, facts.st_mtime_ns]
        found = known.get(name)
        noted[name] = found if found and found[:2] == what else [*what, _hash(folder / name)]
    write_json(folder / DIGESTS, noted)


def noted_digests(folder: Path) -> dict[str, Any]:
    """What ``note_digests`` wrote in a directory."""
    noted = read_json(folder / DIGESTS)
    return noted if isinstance(noted, dict) else {}


def fingerprint_of_image(rootfs: Path, cache: Path) -> str:
    """``fingerprint`` of a root image, with all that it lies over."""
    image, *below = chain_of(rootfs)
    found = fingerprint(image.path, cache)
    if not below:
        return found
    return hashlib.sha256(
        "\n".join([found, *(fingerprint(layer.path, cache) for layer in below)]).encode()
    ).hexdigest()


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
