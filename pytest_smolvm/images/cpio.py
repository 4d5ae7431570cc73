"""Initial RAM disks: cpio archives in the kernel's "newc" format.

Written here because the archive holds a device node, which no unprivileged
user can make on the host first. The format: Documentation/driver-api/
early-userspace/buffer-format.rst in the kernel's sources.
"""

from __future__ import annotations

import io
import stat
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One member; ``mode`` holds the file type, ``device`` major and minor of a node."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, mode: int = 0o755) -> Entry:
    return Entry(name, stat.S_IFDIR | mode)


def file(name: str, data: bytes, mode: int = 0o644) -> Entry:
    return Entry(name, stat.S_IFREG | mode, data)


def character_device(name: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    return Entry(name, stat.S_IFCHR | mode, device=(major, minor))


def symlink(name: str, target: str) -> Entry:
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def archive(entries: list[Entry]) -> bytes:
    """The archive, uncompressed: unpacking costs an emulated guest more than reading."""
    out = io.BytesIO()
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name = entry.name.encode() + b"\0"
        links, mtime, check = 1, 0, 0
        fields = [number, entry.mode, 0, 0, links, mtime, len(entry.data), 0, 0]
        fields += [*entry.device, len(name), check]
        out.write(b"070701" + "".join(f"{field:08x}" for field in fields).encode())
        out.write(name)
        _pad(out)
        out.write(entry.data)
        _pad(out)
    return out.getvalue()


def _pad(out: io.BytesIO) -> None:
    out.write(b"\0" * (-out.tell() % 4))
