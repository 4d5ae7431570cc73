"""Somebody's root file system, as a directory, a tar archive or a disk image, made an ext4 image.

No root rights: who owns what, devices and capabilities are written into the image, not onto the
host's file system (see ``ext4``).
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import zstandard

from pytest_smolvm.errors import ImageError
from pytest_smolvm.images import ext4
from pytest_smolvm.images.cache import Progress
from pytest_smolvm.images.ext4 import Inode
from pytest_smolvm.images.partitions import copy_root_disk, grow

_MIB = 1 << 20
_XATTR = "SCHILY.xattr."
_MADE_BY_THE_KERNEL = ("dev", "proc", "sys")
_LAYERED = ("manifest.json", "oci-layout")


def make_image(source: Path, image: Path, work: Path, size_mb: int | None, say: Progress) -> None:
    """Write the root file system ``source`` as the ext4 image ``image``.

    ``size_mb``: MiB; None: what it holds and as much again, 1024 at the least; a disk image keeps
    its size. ``work``: an empty directory. Raises ``ImageError``.
    """
    if source.is_dir():
        say(f"making a root disk of the directory {source}")
        _check_readable(source)
        inodes = _owners_of(source)
        ext4.make_ext4(source, image, size_mb or _room_for(source), inodes)
    elif _is_tar(source):
        say(f"unpacking {source.name}")
        tree = work / "root"
        inodes = unpack_tar(source, tree)
        say("making the root disk")
        ext4.make_ext4(tree, image, size_mb or _room_for(tree), inodes)
        shutil.rmtree(tree)
    else:
        say(f"copying the disk {source.name}")
        copy_root_disk(source, image, work)
        if size_mb:
            grow(image, size_mb)


def unpack_tar(archive: Path, tree: Path) -> dict[str, Inode]:
    """Unpack a tar archive (gzip, bzip2, xz or zstd, too) as an ordinary user can.

    Returns what each file is to be in the guest.
    """
    tree.mkdir()
    try:
        with open_tar(archive) as tar:
            return unpack_members(tar, tree, archive)
    except zstandard.ZstdError as error:
        raise _not_whole(archive, error) from error


def unpack_members(tar: tarfile.TarFile, tree: Path, archive: Path) -> dict[str, Inode]:
    """The same of an archive that is open, beside what ``tree`` has already."""
    inodes: dict[str, Inode] = {}
    try:
        for member in tar:
            name = os.path.normpath(member.name).lstrip("/")
            if name in _LAYERED and member.isfile():
                raise _layered(archive)
            inode = _inode(member)
            if name == ".":
                inodes[""] = inode
            elif stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode):
                if name.split("/")[0] not in _MADE_BY_THE_KERNEL:
                    _within(tree, member.name, name).parent.mkdir(parents=True, exist_ok=True)
                    inodes[name] = inode
            elif _extract(tar, member, tree, name):
                inodes[name] = inode
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise _not_whole(archive, error) from error
    except OSError as error:
        raise ImageError(
            f"{archive} cannot be unpacked in {tree}: {error.strerror or error}"
        ) from error
    return inodes


def _not_whole(archive: Path, error: Exception) -> ImageError:
    return ImageError(f"{archive} is not a whole tar archive: {error}")


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, tree: Path, name: str) -> bool:
    """Unpack one member, within ``tree`` whatever it says; False: what it is has no use here."""
    known = member.isreg() or member.isdir() or member.issym() or member.islnk() or member.isfifo()
    if not known:
        return False
    target = _within(tree, member.name, name)
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        target.chmod(0o700 | member.mode & 0o777)
        return True
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(target):
        target.unlink()
    if member.issym():
        target.symlink_to(member.linkname)
    elif member.islnk():
        linked = _within(tree, member.linkname, os.path.normpath(member.linkname).lstrip("/"))
        os.link(linked, target, follow_symlinks=False)
    elif member.isfifo():
        os.mkfifo(target)
    else:
        data = tar.extractfile(member)
        assert data is not None  # noqa: S101 - it is a regular file
        with data, target.open("wb") as file:
            shutil.copyfileobj(data, file, _MIB)
        target.chmod(0o600 | member.mode & 0o777)
        os.utime(target, (member.mtime, member.mtime))
    return True


def _within(tree: Path, said: str, name: str) -> Path:
    """Where a member lies; ``ImageError`` if that is not in ``tree``."""
    root, target = tree.resolve(), tree / name
    if ".." in Path(said).parts or not target.parent.resolve().is_relative_to(root):
        raise ImageError(
            f"the archive is refused: its member {said!r} leads out of it, by '..' or by a "
            "symbolic link",
            {"member": said},
        )
    return target


def _inode(member: tarfile.TarInfo) -> Inode:
    kinds = {
        tarfile.DIRTYPE: stat.S_IFDIR,
        tarfile.SYMTYPE: stat.S_IFLNK,
        tarfile.FIFOTYPE: stat.S_IFIFO,
        tarfile.CHRTYPE: stat.S_IFCHR,
        tarfile.BLKTYPE: stat.S_IFBLK,
    }
    kind = kinds.get(member.type, stat.S_IFREG)
    mode = 0o777 if member.issym() else member.mode & 0o7777
    attributes = {
        key.removeprefix(_XATTR): value.encode("utf-8", "surrogateescape")
        for key, value in member.pax_headers.items()
        if key.startswith(f"{_XATTR}security.capability")
    }
    device = (member.devmajor, member.devminor)
    return Inode(kind | mode, member.uid, member.gid, device, attributes)


@contextlib.contextmanager
def open_tar(archive: Path) -> Iterator[tarfile.TarFile]:
    """A tar archive to be read from start to end, however it is compressed."""
    with contextlib.ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(archive.open("rb"))
        head = file.read(4)
        file.seek(0)
        if head == b"\x28\xb5\x2f\xfd":
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            file = stack.enter_context(io.BufferedReader(reader, _MIB))
            yield stack.enter_context(tarfile.open(fileobj=file, mode="r|"))
        else:
            yield stack.enter_context(tarfile.open(fileobj=file, mode="r|*"))


def _is_tar(source: Path) -> bool:
    try:
        with open_tar(source) as tar:
            return tar.next() is not None
    except (tarfile.TarError, EOFError, zstandard.ZstdError):
        return False
    except OSError as error:
        raise ImageError(f"{source} cannot be read: {error.strerror}") from error


def _layered(archive: Path) -> ImageError:
    return ImageError(
        f"{archive} holds the layers of a container image, not one tree of files: give what "
        "'docker export CONTAINER' or 'podman export CONTAINER' writes"
    )


def _check_readable(tree: Path) -> None:
    if not os.access(tree, os.R_OK | os.X_OK):
        raise ImageError(f"the directory {tree} cannot be read: give one that you may read")
    for folder, folders, files in os.walk(tree):
        for name in folders + files:
            path = Path(folder, name)
            mode = path.lstat().st_mode
            wanted = os.R_OK | os.X_OK if stat.S_ISDIR(mode) else os.R_OK
            if not stat.S_ISLNK(mode) and not os.access(path, wanted):
                raise ImageError(
                    f"{path} cannot be read, so the directory {tree} cannot be made an image: give "
                    "a tar archive that root made of it, or run this as its owner"
                )


def _owners_of(tree: Path) -> dict[str, Inode] | None:
    """Who owns what; an ordinary user's own files are root's in the guest."""
    if os.geteuid() != 0:
        return None
    inodes = {}
    for path in [tree, *tree.rglob("*")]:
        facts = path.lstat()
        name = "" if path == tree else str(path.relative_to(tree))
        inodes[name] = Inode(facts.st_mode, facts.st_uid, facts.st_gid)
    return {name: inode for name, inode in inodes.items() if not _is_node(inode)}


def _is_node(inode: Inode) -> bool:
    return stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode)


def _room_for(tree: Path) -> int:
    total = 0
    for folder, folders, files in os.walk(tree):
        for name in folders + files:
            total += Path(folder, name).lstat().st_size + 4096
    return max(1024, 2 * total // _MIB)
