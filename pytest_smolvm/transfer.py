"""Files and trees between host and guest, as tar streams through a command.

Only a shell and ``tar`` are needed in the guest, and one round trip. What comes
out of a guest is not trusted: nothing is written outside the target.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Self

from pytest_smolvm.errors import SmolVMError

Execute = Callable[[str, bytes | None, Callable[[bytes], object]], None]
"""Runs a shell line with standard input; raises unless it ends with status 0."""

_SPOOL_BYTES = 16 << 20
_MODE_MASK = 0o777
_LINE_BYTES = 100
_HEADER_BYTES = 1 << 20


def put(execute: Execute, local: Path, remote: str) -> None:
    """Copy a file, or a tree, from the host to the guest; see ``SmolVM.put``."""
    _check_remote(remote)
    if local.is_dir():
        target = shlex.quote(remote)
        execute(f"mkdir -p {target} && tar -xpf - -C {target}", _pack_tree(local), bytes)
    elif local.is_file():
        mode = local.stat().st_mode & _MODE_MASK
        execute(write_line(remote, local.name, mode), local.read_bytes(), bytes)
    else:
        raise SmolVMError(
            f"{local} is neither a file nor a directory on this host: give the path of one",
            {"local": str(local)},
        )


def write_line(remote: str, name: str, mode: int | None) -> str:
    """The shell line that writes its input to ``remote``, or into it if it is a directory."""
    line = (
        f"t={shlex.quote(remote)}; "
        f'case "$t" in */) t="$t"{shlex.quote(name)} ;; '
        f'*) [ -d "$t" ] && t="$t"/{shlex.quote(name)} ;; esac; '
        'case "$t" in */*) mkdir -p "${t%/*}/" || exit 1 ;; esac; '
        'cat > "$t"'
    )
    return line if mode is None else f'{line} && chmod {mode:o} "$t"'


def get(execute: Execute, remote: str, local: Path) -> None:
    """Copy a file, or a tree, from the guest to the host; see ``SmolVM.get``."""
    _check_remote(remote)
    quoted = shlex.quote(remote)
    line = (
        f"if [ -d {quoted} ]; then cd {quoted} && echo tree && tar -cf - . ; "
        f"elif [ -f {quoted} ]; then echo file && stat -L -c %a {quoted} && cat {quoted}; "
        f"else echo {shlex.quote('no such file or directory: ' + remote)} >&2; exit 1; fi"
    )
    with tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES) as spool:
        execute(line, None, _keep_in(spool))
        spool.seek(0)
        kind = spool.readline(_LINE_BYTES).strip()
        if kind == b"tree":
            unpack_tree(spool, local)
        else:
            mode = spool.readline(_LINE_BYTES).strip()
            if kind != b"file" or not re.fullmatch(rb"[0-7]{1,5}", mode):
                raise SmolVMError(
                    f"the guest was asked for {remote}, and what it sent is neither a file nor a "
                    f"tree: {(kind + mode)[:80]!r}"
                )
            target = local / PurePosixPath(remote).name if local.is_dir() else local
            with _host_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                _write_file(target, spool, int(mode, 8) & _MODE_MASK)


def _keep_in(spool: IO[bytes]) -> Callable[[bytes], object]:
    def keep(data: bytes) -> None:
        try:
            spool.write(data)
        except OSError as error:
            raise SmolVMError(
                f"what the guest sends cannot be kept in {tempfile.gettempdir()}: "
                f"{error.strerror}; nothing of it was copied"
            ) from error

    return keep


class _Member(tarfile.TarInfo):
    """What a guest says of a file; headers that would take all of our memory are refused."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        has_contents = member.type in (*tarfile.REGULAR_TYPES, tarfile.LNKTYPE)
        if not has_contents and member.size > _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of type {member.type!r} has {member.size} bytes")
        return member


def unpack_tree(archive: IO[bytes], target: Path) -> None:
    """Unpack a tar archive made by a guest into ``target``, and nowhere else.

    Links are made last, so that nothing is ever written through one. Device
    nodes and the like are left out; hard links become copies of their own.
    """
    links: list[tuple[Path, str]] = []
    modes: list[tuple[Path, int]] = []
    root = target.absolute()
    with _host_errors(target), tarfile.open(fileobj=archive, mode="r:", tarinfo=_Member) as tar:
        root.mkdir(parents=True, exist_ok=True)
        for member in tar:
            path = root / _inside(member.name)
            if path != root:
                _clear_links(root, path.parent)
            if member.issparse():
                # A few bytes may stand for any number of them. Ours never asks for such.
                raise tarfile.ReadError(f"{member.name!r} is stored with holes")
            if member.isdir():
                if path.is_symlink():
                    path.unlink()
                path.mkdir(parents=True, exist_ok=True)
                modes.append((path, member.mode & _MODE_MASK))
            elif member.issym():
                links.append((path, member.linkname))
            elif member.islnk():
                original = root / _inside(member.linkname)
                if original.is_file() and not original.is_symlink():
                    with original.open("rb") as file:
                        _write_file(path, file, member.mode & _MODE_MASK)
            elif member.isreg():
                content = tar.extractfile(member)
                if content is not None:
                    _write_file(path, content, member.mode & _MODE_MASK)
        # tarfile takes whatever it cannot read for the end, but for the first header.
        archive.seek(tar.offset)
        if archive.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("the archive ends too early")
        for path, text in links:
            _clear_links(root, path.parent)
            if path.is_dir() and not path.is_symlink():
                continue  # the name was a directory's as well: that one has contents
            path.unlink(missing_ok=True)
            path.symlink_to(text)
        # Last: a directory may be read-only.
        for path, mode in reversed(modes):
            if path != root and not path.is_symlink():
                path.chmod(mode)


def _inside(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise SmolVMError(
            f"the guest's archive holds the name {name!r}, which leads out of the target: "
            "nothing more of it was copied"
        )
    return path


def _clear_links(root: Path, folder: Path) -> None:
    # A link left in the target by somebody else must not be followed either.
    for parent in [*reversed(folder.relative_to(root).parents), folder.relative_to(root)]:
        path = root / parent
        if path != root and path.is_symlink():
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def _write_file(path: Path, content: IO[bytes], mode: int) -> None:
    if path.is_symlink():
        path.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        while block := content.read(1 << 20):
            file.write(block)
        os.fchmod(file.fileno(), mode)


def _pack_tree(folder: Path) -> bytes:
    buffer = io.BytesIO()

    def as_root(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
            return None  # sockets, devices: nothing that a copy could stand for
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        return member

    with _host_errors(folder), tarfile.open(fileobj=buffer, mode="w:") as tar:
        tar.add(folder, arcname=".", filter=as_root)
    return buffer.getvalue()


def _check_remote(remote: str) -> None:
    if not remote or "\0" in remote:
        raise SmolVMError(f"{remote!r} is not a path in the guest")


@contextlib.contextmanager
def _host_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
        raise SmolVMError(f"copying to or from {path} on this host failed: {error}") from error
