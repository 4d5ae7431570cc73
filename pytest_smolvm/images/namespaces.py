"""Namespaces in which a distribution's own tools may do as root does, and leave nothing."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pytest_smolvm.process import find_tool, run_tool, still_ours
from pytest_smolvm.statedir import try_lock

_PLACE = Path("/var/tmp")  # noqa: S108 - mkdtemp makes what is used of it


@contextlib.contextmanager
def work_folder(what: str) -> Iterator[Path]:
    """Where ``what`` works: in reach of the users of a namespace, as homes are not.

    What killed builds have left there is removed, too.
    """
    prefix = f"smolvm-{what}-{os.geteuid()}-"
    folder = Path(tempfile.mkdtemp(dir=_PLACE, prefix=prefix))
    folder.chmod(0o755)
    lock = try_lock(folder / "lock")
    try:
        for left in _PLACE.glob(f"{prefix}*"):
            if left != folder and (left / "lock").exists():
                owner = try_lock(left / "lock")
                if owner is not None:
                    _remove(left)
                    owner.release()
        yield folder
    finally:
        _remove(folder)
        if lock is not None:
            lock.release()


def _remove(folder: Path) -> None:
    # Most of it belongs to users that exist in the namespace only. Never through a mount.
    run_tool([*as_root(), "rm", "-rf", "--one-file-system", str(folder)], timeout_s=120)


def as_root() -> list[str]:
    """What comes before a command that is to be root, be it of a namespace only."""
    if os.geteuid() == 0:
        return []
    unshare = find_tool("unshare", "util-linux")
    return [
        *(unshare, "--user", "--map-root-user", "--map-auto", "--"),
        # Asked for anew: a new user namespace takes it back (prctl(2)).
        *(find_tool("setpriv", "util-linux"), "--pdeathsig", "KILL", "--"),
        *still_ours(),
    ]


def ends_whole() -> list[str]:
    """What comes before a command of which nothing is to be left when it is killed: no process
    of its own, no mount."""
    unshare = find_tool("unshare", "util-linux")
    return [unshare, "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--"]


def advice() -> str:
    """What to look at when that failed."""
    if os.geteuid() == 0:
        return "Is the network up?"
    return (
        "Is the network up? As an ordinary user this takes user namespaces with a range of ids "
        "(on Debian: apt-get install uidmap, and a line for you in /etc/subuid and /etc/subgid) "
        "and unshare of util-linux 2.38 or later."
    )
