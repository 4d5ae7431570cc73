"""Runs of pytest in processes of their own, which a test can interrupt as a terminal would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def start(*arguments: str) -> subprocess.Popen[str]:
    """A run in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a run has made a file."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"the run did not make {path}"
        time.sleep(0.01)


def interrupt(run: subprocess.Popen[str], *signs: Path) -> str:
    """Press Ctrl-C, once there are these files; returns what the run printed."""
    with run:
        for sign in signs:
            wait_for(sign, run)
        # As a terminal does it: to the whole process group.
        os.killpg(run.pid, signal.SIGINT)
        output, _ = run.communicate(timeout=60)
    assert run.returncode == pytest.ExitCode.INTERRUPTED, output
    return output
