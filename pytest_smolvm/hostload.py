"""Whether this host's processors have anything better to do."""

from __future__ import annotations

import os
from pathlib import Path

_LOADAVG = Path("/proc/loadavg")


def processors_are_busy(loadavg: Path = _LOADAVG) -> bool:
    """Whether as many threads run or wait to run now as there are processors.

    False where there is no way to tell. See proc(5) on the fourth field of /proc/loadavg.
    """
    try:
        running = int(loadavg.read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return False
    # The thread that asks is one of them.
    return running - 1 >= _processors()


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
