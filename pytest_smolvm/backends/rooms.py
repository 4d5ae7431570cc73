"""Where a Firecracker process lives: in the VM's directory, or in a jail that it cannot leave.

The process is given names in its room, not paths: what it saves can then be loaded in another room.

The jail is made by Firecracker's own jailer, where ``SMOLVM_JAILER`` asks for it: a chroot and a
user of its own (docs/jailer.md in Firecracker's sources). That takes root. A process that changes
its user loses the signal that ends it with its owner (prctl(2)), so a process namespace is made for
it, whose first process has that signal, and with which all in it end.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pytest_smolvm.errors import BackendError
from pytest_smolvm.process import MachineProcess, ToolError, find_tool
from pytest_smolvm.rawdisks import copy_disk

VARIABLE = "SMOLVM_JAILER"
_END_TIMEOUT_S = 5.0

# The first process of the namespace: it waits, and ends as the jailer does.
_FIRST = '"$@" & wait "$!"'


class Room(Protocol):
    """The directory of one process."""

    directory: Path
    may_drop_capabilities: bool

    def command(self, binary: str, vm_id: str, arguments: Sequence[str]) -> list[str]:
        """The command line that starts the process there."""
        ...

    def make(self, name: str) -> None:
        """Make an empty file that the process may write to."""
        ...

    def end(self, process: MachineProcess) -> None:
        """End the process, and see it ended."""
        ...

    def leave(self) -> None:
        """Remove what nobody needs once the process has ended."""
        ...

    def bring(self, path: Path, *, writable: bool = False) -> str:
        """Have a file be in reach of the process; returns what that calls it."""
        ...

    def fetch(self, name: str, target: Path) -> None:
        """Move a file that the process wrote to where it is wanted."""
        ...

    def name_for(self, target: Path) -> str:
        """What the process is to call a file that it writes, for ``fetch``."""
        ...


def room_for(directory: Path, vm_id: str, binary: str) -> Room:
    """The room that is asked for; ``BackendError`` where that cannot be had."""
    wanted = os.environ.get(VARIABLE, "")
    if not wanted:
        return OpenRoom(directory)
    found = re.fullmatch(r"(\d+):(\d+)", wanted)
    if found is None or 0 in map(int, found.groups()):
        raise BackendError(
            f"{VARIABLE}={wanted!r} is not valid: give a user and a group that are not root, as "
            "numbers, such as 1000:1000; or unset it, to go without the jailer"
        )
    if os.geteuid() != 0:
        raise BackendError(f"{VARIABLE} asks for Firecracker's jailer, which takes root")
    jailer = shutil.which("jailer")
    if jailer is None:
        raise BackendError(
            f"{VARIABLE} asks for Firecracker's jailer, and no program called 'jailer' is on PATH: "
            "it comes with each release of Firecracker"
        )
    try:
        unshare = find_tool("unshare", "util-linux")
    except ToolError as error:
        raise BackendError(f"{VARIABLE} cannot be done: {error.message}") from error
    # The jail is called after the program, as it is called where links lead.
    program = str(Path(binary).resolve())
    return Jail(directory, vm_id, program, jailer, unshare, int(found[1]), int(found[2]))


class OpenRoom:
    """The VM's directory; every file of the host is in reach by its path."""

    may_drop_capabilities = True

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def command(self, binary: str, vm_id: str, arguments: Sequence[str]) -> list[str]:
        return [binary, "--id", vm_id, *arguments]

    def make(self, name: str) -> None:
        (self.directory / name).touch(mode=0o600)

    def end(self, process: MachineProcess) -> None:
        process.kill()

    def leave(self) -> None:
        """All that is there is the VM's."""

    def bring(self, path: Path, *, writable: bool = False) -> str:  # noqa: ARG002
        path = path.absolute()
        return path.name if path.parent == self.directory.absolute() else str(path)

    def name_for(self, target: Path) -> str:
        return str(target)

    def fetch(self, name: str, target: Path) -> None:
        """It is there already."""


class Jail:
    """A chroot in the VM's directory."""

    may_drop_capabilities = False  # the jailer takes them, and then gives them up

    def __init__(
        self,
        directory: Path,
        vm_id: str,
        binary: str,
        jailer: str,
        unshare: str,
        user: int,
        group: int,
    ) -> None:
        self._binary = binary
        self._base = directory / "jail"
        # <base>/<name of the program>/<id>/root, as the jailer has it.
        self.directory = self._base / Path(binary).name / vm_id / "root"
        shutil.rmtree(self._base, ignore_errors=True)  # of the process before
        self.directory.mkdir(mode=0o700, parents=True)
        os.chown(self.directory, user, group)
        self._jailer, self._unshare = jailer, unshare
        self._user, self._group = user, group

    def command(self, binary: str, vm_id: str, arguments: Sequence[str]) -> list[str]:  # noqa: ARG002
        return [
            *(self._unshare, "--pid", "--fork", "--kill-child", "--"),
            *("sh", "-c", _FIRST, "sh"),
            *(self._jailer, "--id", vm_id, "--exec-file", self._binary),
            *("--uid", str(self._user), "--gid", str(self._group)),
            *("--chroot-base-dir", str(self._base), "--cgroup-version", "2"),
            *("--", *arguments),
        ]

    def make(self, name: str) -> None:
        (self.directory / name).touch(mode=0o600)
        os.chown(self.directory / name, self._user, self._group)

    def end(self, process: MachineProcess) -> None:
        # Once the first process of a namespace is seen ended, so are all others in it.
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            for child in children.split():
                os.kill(int(child), signal.SIGKILL)
            process.wait(_END_TIMEOUT_S)
        process.kill()

    def leave(self) -> None:
        shutil.rmtree(self._base, ignore_errors=True)

    def bring(self, path: Path, *, writable: bool = False) -> str:
        name = path.name
        target = self.directory / name
        target.unlink(missing_ok=True)
        if writable:
            # What it writes is to be in our file.
            target.hardlink_to(path)
        else:
            copy_disk(path, target)
        os.chown(target, self._user, self._group)
        return name

    def name_for(self, target: Path) -> str:
        return f"{target.name}.new"

    def fetch(self, name: str, target: Path) -> None:
        written = self.directory / name
        os.chown(written, os.geteuid(), os.getegid())
        with contextlib.suppress(OSError):
            written.replace(target)
            return
        copy_disk(written, target)  # another file system
        written.unlink()
