"""Root disks: a directory tree made into an ext4 image, without root rights."""

from __future__ import annotations

import os
from pathlib import Path

from pytest_smolvm.errors import ImageError
from pytest_smolvm.process import ToolError, find_tool, run_tool


def make_ext4(tree: Path, image: Path, size_mb: int) -> None:
    """Write ``tree`` as an ext4 image of ``size_mb`` MiB, all owned by root in the guest.

    ``mkfs.ext4 -d`` copies the owners it finds on the host; debugfs then makes
    them root's, which takes no rights since it only edits a file of ours.
    """
    mkfs = find_tool("mkfs.ext4", "e2fsprogs")
    debugfs = find_tool("debugfs", "e2fsprogs")
    try:
        run_tool(
            [
                mkfs,
                "-q",
                "-F",
                "-L",
                "smolvm",
                "-m",
                "0",
                # No guest has to finish the file system in the background.
                "-E",
                "lazy_itable_init=0,lazy_journal_init=0",
                "-d",
                str(tree),
                str(image),
                f"{size_mb}m",
            ],
            timeout_s=600,
        )
    except ToolError as error:
        raise ImageError(
            f"the root disk of {size_mb} MiB could not be made; if it is too small for its "
            f"contents, give a larger rootfs_size_mb\n{error.message}"
        ) from error
    if os.geteuid() != 0:
        commands = [
            f"set_inode_field {_quote(path)} {field} 0"
            for path in _paths(tree)
            for field in ("uid", "gid")
        ]
        run_tool(
            [debugfs, "-w", "-f", "-", str(image)],
            timeout_s=600,
            stdin="\n".join(commands).encode() + b"\n",
        )


def read_file(image: Path, path: str) -> bytes | None:
    """One file's contents out of an ext4 image; None when there is no such file."""
    debugfs = find_tool("debugfs", "e2fsprogs")
    text = run_tool([debugfs, "-R", f"cat {_quote(path)}", str(image)], timeout_s=60)
    return text.encode() or None


def has_file(image: Path, path: str) -> bool:
    """Whether an ext4 image has that file."""
    debugfs = find_tool("debugfs", "e2fsprogs")
    text = run_tool([debugfs, "-R", f"stat {_quote(path)}", str(image)], timeout_s=60)
    return text.startswith("Inode:")


def _paths(tree: Path) -> list[str]:
    found = ["/"]
    for folder, folders, files in os.walk(tree):
        inside = Path("/", Path(folder).relative_to(tree))
        found += [str(inside / name) for name in folders + files]
    return found


def _quote(path: str) -> str:
    if '"' in path or "\n" in path:
        raise ImageError(f"{path!r} cannot go into an image: quotes and newlines are not supported")
    return f'"{path}"'
