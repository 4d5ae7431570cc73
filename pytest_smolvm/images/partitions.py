"""The root file system on somebody's disk image: found, taken out, made larger."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pytest_smolvm.disks import copy_sparsely, image_format
from pytest_smolvm.errors import ImageError
from pytest_smolvm.images import ext4
from pytest_smolvm.process import find_tool, run_tool

_MIB = 1 << 20
_SECTOR = 512
_GPT_LINUX = {
    # "Linux filesystem data", and the roots of x86-64 and arm64: the UEFI specification's list,
    # and the Discoverable Partitions Specification.
    "0fc63daf-8483-4772-8e79-3d69d8477de4",
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709",
    "b921b045-1df0-41c3-af44-4c6f280d3fae",
}
_MBR_LINUX = 0x83
_MBR_PROTECTS_GPT = 0xEE


def copy_root_disk(source: Path, image: Path, work: Path) -> None:
    """Copy the ext4 file system on a disk image, raw or qcow2, partitioned or not, to ``image``.

    ``work``: a directory to work in. Raises ``ImageError``.
    """
    raw = source
    if image_format(source) == "qcow2":
        raw = work / "disk.raw"
        qemu_img = find_tool("qemu-img", "qemu-utils")
        run_tool(
            [qemu_img, "convert", "-f", "qcow2", "-O", "raw", str(source), str(raw)], timeout_s=1800
        )
    if ext4.is_ext4(raw):
        copy_sparsely(raw, image)
        return
    for start, length in _partitions(raw):
        if ext4.is_ext4(raw, start):
            _cut_out(raw, image, start, length)
            return
    raise ImageError(
        f"{source} is neither a tar archive nor a disk image with an ext2, ext3 or ext4 file "
        "system on it or on one of its partitions: give a directory, a tar archive (docker "
        "export), or such an image",
        {"path": str(source)},
    )


@dataclass(frozen=True)
class _Partition:
    start: int
    length: int
    is_linux: bool


def _partitions(disk: Path) -> list[tuple[int, int]]:
    """Where partitions lie, in bytes: Linux ones first, the larger ones first."""
    with disk.open("rb") as file:
        first = file.read(_SECTOR)
        if len(first) < _SECTOR or first[510:] != b"\x55\xaa":
            return []
        entries = [first[446 + 16 * n : 462 + 16 * n] for n in range(4)]
        found = [
            _Partition(start * _SECTOR, count * _SECTOR, entry[4] == _MBR_LINUX)
            for entry in entries
            for start, count in [struct.unpack_from("<II", entry, 8)]
            if entry[4] and count
        ]
        if any(entry[4] == _MBR_PROTECTS_GPT for entry in entries):
            found = _read_gpt(file)
    found.sort(key=lambda part: (not part.is_linux, -part.length))
    return [(part.start, part.length) for part in found]


def _read_gpt(file: IO[bytes]) -> list[_Partition]:
    # UEFI specification, 5.3: the header in the second sector, and its entries.
    file.seek(_SECTOR)
    header = file.read(92)
    if header[:8] != b"EFI PART":
        return []
    table, count, size = struct.unpack_from("<QII", header, 72)
    found = []
    for number in range(min(count, 128)):
        file.seek(table * _SECTOR + number * size)
        entry = file.read(128)
        if len(entry) < 128 or entry[:16] == bytes(16):
            continue
        first, last = struct.unpack_from("<QQ", entry, 32)
        fields = struct.unpack_from("<IHH", entry)
        kind = f"{fields[0]:08x}-{fields[1]:04x}-{fields[2]:04x}-"
        kind += f"{entry[8:10].hex()}-{entry[10:16].hex()}"
        length = (last - first + 1) * _SECTOR
        found.append(_Partition(first * _SECTOR, length, kind in _GPT_LINUX))
    return found


def _cut_out(disk: Path, image: Path, start: int, length: int) -> None:
    with disk.open("rb") as reader, image.open("wb") as writer:
        reader.seek(start)
        left = length
        while left > 0 and (block := reader.read(min(_MIB, left))):
            left -= len(block)
            if block.strip(b"\0"):
                writer.write(block)
            else:
                writer.seek(len(block), os.SEEK_CUR)
        writer.truncate(length)


def grow(image: Path, size_mb: int) -> None:
    """Make a file system's image larger, to ``size_mb`` MiB; never smaller."""
    have = image.stat().st_size
    if size_mb * _MIB < have:
        raise ImageError(
            f"rootfs_size_mb={size_mb} is less than the {have // _MIB} MiB of the disk: give that "
            "or more, or leave it out"
        )
    if size_mb * _MIB > have:
        os.truncate(image, size_mb * _MIB)
        run_tool([find_tool("e2fsck", "e2fsprogs"), "-fp", str(image)], timeout_s=600)
        run_tool([find_tool("resize2fs", "e2fsprogs"), str(image)], timeout_s=600)
