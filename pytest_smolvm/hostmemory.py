"""How much memory this host can still give."""

from __future__ import annotations

import contextlib
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def available_mib(
    meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP, cgroup_root: Path = _CGROUP_ROOT
) -> int | None:
    """MiB that can be had without swapping: the kernel's estimate, or less in a container.

    None where there is no way to tell. See proc(5) on MemAvailable, and
    Documentation/admin-guide/cgroup-v2.rst on memory.max.
    """
    found = [_from_meminfo(meminfo), *_from_cgroups(cgroup, cgroup_root)]
    known = [value for value in found if value is not None]
    return min(known) if known else None


def _from_meminfo(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) >> 10
    return None


def _from_cgroups(path: Path, root: Path) -> list[int | None]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    groups = [line[3:].strip("/") for line in lines if line.startswith("0::")]
    found: list[int | None] = []
    for group in groups:
        folder = root / group
        while True:
            found.append(_left_in(folder))
            if folder == root:
                break
            folder = folder.parent
    return found


def _left_in(group: Path) -> int | None:
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        # Cached files count as used, and make room when it is needed.
        for line in (group / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                used -= int(line.split()[1])
    except (OSError, ValueError):
        return None  # no limit says "max"
    return max(0, limit - used) >> 20
