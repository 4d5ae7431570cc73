"""What is shown while one waits: lines that appear at once, though pytest captures output."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pytest_smolvm.terminal import harmless

SILENT_S = 2.0


def verbosity_of(config: pytest.Config) -> int:
    """How often -v was given; below 0: -q. pytest 8.0's own way fails without its terminal."""
    return int(getattr(config.option, "verbose", 0))


def show_progress(config: pytest.Config, line: str) -> None:
    """Show a line at once; a quiet run (-q) shows none."""
    if verbosity_of(config) < 0:
        return
    # A worker of xdist has a terminal that writes to nowhere, but shares its controller's screen.
    worker = getattr(config, "workerinput", {}).get("workerid")
    reporter = None if worker else config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")
    suspended = (
        contextlib.nullcontext() if capture is None else capture.global_and_fixture_disabled()
    )
    with suspended:
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(f"smolvm: {line}")
        else:
            who = f"[{worker}] " if worker else ""
            print(f"{who}smolvm: {line}", file=sys.__stderr__, flush=True)


def shown_live(config: pytest.Config) -> Callable[[bytes], object]:
    """What a command prints in a guest, taken as it comes; with -v its lines are shown."""
    if verbosity_of(config) < 1:
        return bytes
    rest = b""

    def take(data: bytes) -> None:
        nonlocal rest
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            show_progress(config, f"| {harmless(line.decode(errors='replace'))}")

    return take


@contextlib.contextmanager
def told_when_slow(config: pytest.Config, what: str) -> Iterator[None]:
    """With -v, say every so often that something is still under way.

    The test run's own thread waits meanwhile, and goes on only when nothing is
    being written any more.
    """
    if verbosity_of(config) < 1:
        yield
        return
    done = threading.Event()
    began = time.monotonic()

    def tell() -> None:
        pause_s = SILENT_S
        while not done.wait(pause_s):
            show_progress(config, f"{what} [{time.monotonic() - began:.0f} s]")
            pause_s = min(pause_s * 2, 30.0)

    teller = threading.Thread(target=tell, name="smolvm-progress", daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
