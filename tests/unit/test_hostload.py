"""Whether the host's processors are busy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_smolvm.hostload import processors_are_busy

CPUS = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("running", "busy"), [(1, False), (CPUS, False), (CPUS + 1, True), (CPUS + 50, True)]
)
def test_busy_is_when_every_processor_has_a_thread_beside_the_one_that_asks(
    tmp_path: Path, running: int, busy: bool
) -> None:
    loadavg = tmp_path / "loadavg"
    loadavg.write_text(f"0.20 0.18 0.12 {running}/{running + 300} 11206\n")
    assert processors_are_busy(loadavg) is busy


@pytest.mark.parametrize("text", ["", "nonsense", None])
def test_where_there_is_no_way_to_tell_they_are_not(tmp_path: Path, text: str | None) -> None:
    loadavg = tmp_path / "loadavg"
    if text is not None:
        loadavg.write_text(text)
    assert processors_are_busy(loadavg) is False


def test_this_hosts_own_can_be_asked() -> None:
    assert processors_are_busy() in (True, False)
