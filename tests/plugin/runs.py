"""Runs of pytest in processes of their own, which a test can interrupt as a terminal would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Sign = Callable[[], object]


def start(*arguments: str) -> subprocess.Popen[str]:
    """A run in a process group of its own, which shares no cache with one beside it."""
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def long_test(marker: Path) -> str:
    """A test that has a VM, says by ``marker`` that it runs, and does not end."""
    return f"""
import time
from pathlib import Path

def test_long(smolvm):
    Path("{marker}").touch()
    time.sleep(600)
"""


def wait_for(happened: Sign, process: subprocess.Popen[str]) -> None:
    """Wait until a run has brought something about."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"in vain for {happened}"
        time.sleep(0.01)


def interrupt(run: subprocess.Popen[str], *signs: Sign) -> str:
    """Press Ctrl-C, once all of this has happened; returns what the run printed."""
    with run:
        for sign in signs:
            wait_for(sign, run)
        # As a terminal does it: to the whole process group.
        os.killpg(run.pid, signal.SIGINT)
        output, _ = run.communicate(timeout=60)
    assert run.returncode == pytest.ExitCode.INTERRUPTED, output
    return output
