"""What a machine's process may not do, should its guest take it over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_KEPT_CAPABILITIES = ("dac_read_search", "net_bind_service")
"""Of root's: to read images that lie in other users' directories, and to forward low ports."""
_CAP_SETPCAP = 8  # linux/capability.h
_BLOCK_BYTES = 512  # the unit of sh's ulimit -f: POSIX
_KEPT_VARIABLES = ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "GLIBC_TUNABLES")
_KEPT_PREFIXES = ("LC_", "QEMU_", "MALLOC_", "DYLD_")


@dataclass(frozen=True)
class Limits:
    """What a process may take of the host."""

    data_bytes: int
    """Memory of its own: RLIMIT_DATA, getrlimit(2)."""
    file_bytes: int
    """How large a file may become that it writes: RLIMIT_FSIZE."""


def privileges(*, drop_capabilities: bool = True) -> list[str]:
    """Arguments of setpriv: never more rights than now, and none of root's that it can do without.

    Where this process may not give them up for its children they stay.
    """
    arguments = ["--no-new-privs"]
    if drop_capabilities and _may_drop_capabilities():
        kept = ",".join(f"+{name}" for name in _KEPT_CAPABILITIES)
        arguments += [f"--bounding-set=-all,{kept}", "--inh-caps=-all"]
    return arguments


def ulimits(limits: Limits | None) -> str:
    """Shell commands that set the limits; where lower ones hold already, those stay.

    What it makes, sockets say, is nobody else's business.
    """
    wanted = {"c": 0}  # a core dump would hold all that the guest's memory does
    if limits is not None:
        wanted["d"] = limits.data_bytes >> 10
        wanted["f"] = -(-limits.file_bytes // _BLOCK_BYTES)
    limited = (f"ulimit -{name} {value} 2>/dev/null; " for name, value in wanted.items())
    return "".join(["umask 077; ", *limited])


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a machine's process gets of our environment, which may hold tokens and passwords."""
    own = os.environ if variables is None else variables
    return {
        name: value
        for name, value in own.items()
        if name in _KEPT_VARIABLES or name.startswith(_KEPT_PREFIXES)
    }


def find_setpriv() -> str | None:
    """util-linux's setpriv, which makes the calls before it becomes the command.

    So no code runs between fork and exec in a threaded Python. None: there is none here.
    """
    return shutil.which("setpriv")


def _may_drop_capabilities() -> bool:
    if os.geteuid() != 0:
        return False  # there are none
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return False
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> _CAP_SETPCAP & 1)
