"""The state directory's place, and files in it that are whole and private."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import platformdirs
from filelock import FileLock, Timeout

from pytest_smolvm.errors import OperationTimeoutError, SmolVMError
from pytest_smolvm.paths import expanded

BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's: stat(2)
STATE_DIR_VARIABLE = "SMOLVM_STATE_DIR"


def platform_state_dir() -> Path:
    """``pytest-smolvm`` in the platform's user state directory."""
    return platformdirs.user_state_path("pytest-smolvm")


def default_state_dir() -> Path:
    """``SMOLVM_STATE_DIR``, or the platform's."""
    given = os.environ.get(STATE_DIR_VARIABLE)
    return expanded(given).absolute() if given else platform_state_dir()


def make_private_dir(path: Path) -> Path:
    """Make the directory and its parents, each 0700 if it is new; errors say what to do."""
    try:
        # mkdir(parents=True) would make the parents with the default mode.
        for folder in (*reversed(path.parents), path):
            if not folder.is_dir():
                folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SmolVMError(
            f"the directory {path} cannot be made: {error.strerror}; set SMOLVM_STATE_DIR to a "
            "directory that you can write to",
            {"path": str(path)},
        ) from error
    return path


def check_usable(root: Path) -> None:
    """Raise ``SmolVMError`` unless what is written there is ours alone, and locks exclude.

    Only root may use what another user owns: containers see the host's directories that way.
    """
    facts = root.stat()
    if facts.st_uid != os.geteuid() and os.geteuid() != 0:
        raise _unusable(root, f"it belongs to another user (uid {facts.st_uid})")
    if facts.st_mode & stat.S_IWOTH:
        raise _unusable(root, f"everybody may write to it; chmod 700 {shlex.quote(str(root))}, or")
    probe = root / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with probe.open("xb", buffering=0) as one, probe.open("rb") as another:
            one.write(b"x")
            if not (_may_lock(one) and not _may_lock(another)):
                raise _unusable(root, "its file system grants locks that exclude nobody")
    except OSError as error:
        raise _unusable(root, f"{error.strerror}, at an attempt to lock a file there") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _may_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unusable(root: Path, why: str) -> SmolVMError:
    return SmolVMError(
        f"the state directory {root} cannot be used: {why}{'' if why.endswith('or') else ';'} set "
        f"{STATE_DIR_VARIABLE} to a directory of your own on a local disk",
        {"path": str(root)},
    )


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file that is there whole or not at all, whatever interrupts."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SmolVMError(f"{path} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def locked(
    path: Path,
    *,
    operation: str,
    timeout_s: float,
    on_wait: Callable[[], object] = lambda: None,
) -> Iterator[None]:
    """Hold the lock file ``path``; waiting longer than ``timeout_s`` is an error.

    ``on_wait`` is called if another holds it, before the wait.
    """
    lock = FileLock(path, mode=0o600)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            on_wait()
            lock.acquire(timeout=timeout_s, poll_interval=0.02)
    except Timeout:
        raise OperationTimeoutError(
            operation, timeout_s, f"another process holds {path}; see: fuser -v {path}"
        ) from None
    try:
        yield
    finally:
        lock.release()


def try_lock(path: Path) -> FileLock | None:
    """The lock file ``path``, held until it is released; None: another holds it."""
    # thread_local: what it guards may be given up by another thread than took it.
    # is_singleton: two owners within one process must exclude each other too.
    lock = FileLock(path, mode=0o600, thread_local=False, is_singleton=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def allocated_bytes(directory: Path, *, linked: bool = True) -> int:
    """What the files in a directory take of the disk; holes take nothing.

    ``linked=False`` leaves out those that lie in other directories as well (hard links).
    """
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for path in directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                facts = path.lstat()
                if linked or facts.st_nlink == 1:
                    total += facts.st_blocks * BLOCK_BYTES
    return total


def remove_tree(path: Path) -> None:
    """Remove a directory with all it holds; one that is gone is no error."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise SmolVMError(
            f"{path} cannot be removed: {error.strerror}; remove it by hand: rm -r {path}",
            {"path": str(path)},
        ) from error


def read_json(path: Path) -> Any:
    """The JSON in a cache file; None when it is missing or broken (a cache may be either)."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Write a cache file for ``read_json``."""
    write_atomically(path, json.dumps(value).encode())
