"""Root disks: ext4 images made, looked into and added to without root rights.

``mkfs.ext4 -d`` copies a directory tree with the owners that it finds on the host; ``debugfs``
then makes of them what they are to be in the guest, which takes no rights, since it only edits a
file of ours.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pytest_smolvm.errors import ImageError
from pytest_smolvm.process import ToolError, find_tool, run_tool

_MAGIC_AT, _MAGIC = 0x438, b"\x53\xef"
_TIMEOUT_S = 600
_PROMPT = "debugfs"
_SAID_ANYWAY = ("Allocated inode:",)


@dataclass(frozen=True)
class Inode:
    """What a file is in the guest, where the host's file system may not be able to say it."""

    mode: int
    """Type and permissions, as in ``st_mode``."""
    uid: int = 0
    gid: int = 0
    device: tuple[int, int] = (0, 0)
    """Major and minor number of a device node."""
    attributes: dict[str, bytes] = field(default_factory=dict)
    """Extended attributes, such as ``security.capability``."""


def make_ext4(
    tree: Path, image: Path, size_mb: int, inodes: Mapping[str, Inode] | None = None
) -> None:
    """Write ``tree`` as an ext4 image of ``size_mb`` MiB.

    ``inodes``, by path without a leading slash, says what files are in the guest. None: each is
    what it is on the host, but for its owner, which is root.
    """
    mkfs = find_tool("mkfs.ext4", "e2fsprogs")
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
            timeout_s=_TIMEOUT_S,
        )
    except ToolError as error:
        raise ImageError(
            f"the root disk of {size_mb} MiB could not be made; if it is too small for its "
            f"contents, give a larger rootfs_size_mb\n{error.message}"
        ) from error
    with tempfile.TemporaryDirectory(dir=image.parent, prefix=".attributes-") as folder:
        edit(image, _corrections(tree, inodes, Path(folder)))


def _corrections(tree: Path, inodes: Mapping[str, Inode] | None, folder: Path) -> list[str]:
    """debugfs's commands that make each file what it is in the guest."""
    commands = []
    for path in _paths(tree):
        facts = (tree / path).lstat()
        wanted = Inode(facts.st_mode) if inodes is None else inodes.get(path, Inode(facts.st_mode))
        for name, value, found in (
            ("uid", wanted.uid, facts.st_uid),
            ("gid", wanted.gid, facts.st_gid),
            ("mode", wanted.mode, facts.st_mode),
        ):
            if value != found:
                text = f"0{value:o}" if name == "mode" else str(value)
                commands.append(f"set_inode_field {quote('/' + path)} {name} {text}")
        for key, data in wanted.attributes.items():
            file = folder / str(len(commands))
            file.write_bytes(data)
            commands.append(f"ea_set -f {quote(str(file))} {quote('/' + path)} {key}")
    for path, inode in (inodes or {}).items():
        if stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode):
            kind = "c" if stat.S_ISCHR(inode.mode) else "b"
            folder_inside, _, name = f"/{path}".rpartition("/")
            commands += [
                f"cd {quote(folder_inside or '/')}",  # mknod knows names only, not paths
                f"mknod {quote(name)} {kind} {inode.device[0]} {inode.device[1]}",
                f"set_inode_field {quote(name)} mode 0{inode.mode:o}",
                "cd /",
            ]
    return commands


def edit(image: Path, commands: Iterable[str]) -> None:
    """Have debugfs carry out ``commands``; one that fails is an ``ImageError``."""
    text = "\n".join(commands)
    if not text:
        return
    debugfs = find_tool("debugfs", "e2fsprogs")
    with tempfile.NamedTemporaryFile(dir=image.parent, prefix=".edit-") as script:
        script.write(text.encode() + b"\n")
        script.flush()
        # It tells of failures, but its exit status does not.
        said = run_tool(
            ["sh", "-c", 'exec "$0" "$@" 2>&1', debugfs, "-w", "-f", script.name, str(image)],
            timeout_s=_TIMEOUT_S,
        )
    problems = [
        line for line in said.splitlines() if line and not line.startswith((_PROMPT, *_SAID_ANYWAY))
    ]
    if problems:
        raise ImageError(f"{image.name} could not be changed: {problems[0]}", {"said": problems})


def add_tree(image: Path, source: Path, inside: str) -> None:
    """Add the directory ``source`` to an image as ``inside``, whose parent is there; root's."""
    commands = [f"mkdir {quote(inside)}"]
    modes = []
    for name in _paths(source):
        if not name:
            continue
        path, target = source / name, quote(f"{inside}/{name}")
        if path.is_symlink():
            commands.append(f"symlink {target} {quote(str(path.readlink()))}")
        elif path.is_dir():
            commands.append(f"mkdir {target}")
        else:
            commands.append(f"write {quote(str(path))} {target}")
            modes.append(f"set_inode_field {target} mode 0{path.stat().st_mode:o}")
    edit(image, [*commands, *modes])


def is_ext4(image: Path, offset: int = 0) -> bool:
    """Whether a file has an ext2, 3 or 4 file system in it, ``offset`` bytes from its start."""
    with image.open("rb") as file:
        file.seek(offset + _MAGIC_AT)
        return file.read(len(_MAGIC)) == _MAGIC


def free_bytes(image: Path) -> int:
    """How much the file system has room for."""
    text = _ask(image, "stats -h")
    facts = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(facts["Free blocks"]) * int(facts["Block size"])


def read_file(image: Path, path: str) -> bytes | None:
    """One text file's contents out of an ext4 image; None when there is no such file."""
    return _ask(image, f"cat {quote(path)}").encode() or None


def copy_out(image: Path, path: str, target: Path) -> None:
    """Copy one file out of an image. ``ImageError`` if it is not there."""
    _ask(image, f"dump {quote(path)} {quote(str(target))}")
    if not target.exists():
        raise ImageError(f"{image} has no file {path}")


def copy_tree_out(image: Path, path: str, target: Path) -> None:
    """Copy a directory out of an image, into ``target``, which is there."""
    _ask(image, f"rdump {quote(path)} {quote(str(target))}")


def has_file(image: Path, path: str) -> bool:
    """Whether an ext4 image has that file."""
    return _ask(image, f"stat {quote(path)}").startswith("Inode:")


def names_in(image: Path, folder: str) -> list[str]:
    """The names in a directory of an image; none where there is no such directory."""
    names = []
    for line in _ask(image, f"ls -p {quote(folder)}").splitlines():
        # /inode/mode/uid/gid/name/size/
        parts = line.split("/")
        if len(parts) > 5 and parts[1] != "0" and parts[5] not in (".", ".."):
            names.append(parts[5])
    return names


def resolve(image: Path, path: str) -> str:
    """``path`` in an image with the symbolic link that its first folder may be followed.

    debugfs follows links on its way to a file, but not where it makes one.
    """
    first, _, rest = path.lstrip("/").partition("/")
    shown = _ask(image, f"stat {quote('/' + first)}")
    for line in shown.splitlines():
        if line.startswith("Fast link dest:"):
            destination = line.split('"')[1].lstrip("/")
            return f"/{destination}/{rest}"
    return path


def _ask(image: Path, request: str) -> str:
    debugfs = find_tool("debugfs", "e2fsprogs")
    return run_tool([debugfs, "-R", request, str(image)], timeout_s=_TIMEOUT_S)


def _paths(tree: Path) -> list[str]:
    found = [""]
    for folder, folders, files in os.walk(tree):
        inside = Path(folder).relative_to(tree)
        found += [str(inside / name) for name in folders + files]
    return found


def quote(path: str) -> str:
    """``path`` as debugfs reads it."""
    if "\n" in path:
        raise ImageError(f"{path!r} cannot go into an image: newlines in names are not supported")
    return '"' + path.replace('"', '""') + '"'
