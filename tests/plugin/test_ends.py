"""Runs that end before their time, on real machines: by pytest-timeout, Ctrl-C, faulthandler."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pytest_smolvm.inventory import inventory
from pytest_smolvm.process import Deadline
from pytest_smolvm.store import Store
from tests.conftest import qemu_pids
from tests.plugin.runs import long_test, start, wait_for

pytestmark = pytest.mark.usefixtures("micro", "with_other_plugins")

HANGS = """
import pytest

@pytest.mark.timeout(3, func_only=True)
def test_hangs(smolvm):
    smolvm.run("sleep 600", timeout=600)

def test_after_it(smolvm):
    assert smolvm.run("echo on").output == "on"
"""


@pytest.fixture
def state(no_vms: Path) -> Path:
    return no_vms


def end(run: subprocess.Popen[str]) -> str:
    """What a run printed, which must end, and nothing of it live on."""
    with run:
        output, _ = run.communicate(timeout=120)
    deadline = Deadline(30)
    while qemu_pids():  # the kernel kills them as the run dies, which may be seen first
        assert not deadline.passed(), output
        time.sleep(0.01)
    return output


def check_swept(state: Path, *kept: str) -> None:
    """The next run removes all but what was kept for these reasons."""
    store = Store(state)
    store.sweep()
    left = [entry.record.retained for entry in inventory(store)]
    assert [retained.reason for retained in left if retained] == list(kept)
    assert len(list(store.vms.iterdir())) == len(kept)


def test_a_test_that_pytest_timeout_ends_by_a_signal_fails_and_the_next_one_runs(
    pytester: pytest.Pytester, state: Path
) -> None:
    pytester.makepyfile(HANGS)
    run = start("-v", "--timeout-method=signal")
    output = end(run)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
    assert "1 failed, 1 passed" in output, output
    assert "Failed: Timeout" in output, output
    assert "INTERNALERROR" not in output
    check_swept(state, "the test failed")


def test_a_boot_that_pytest_timeout_ends_by_a_signal_leaves_nothing(
    pytester: pytest.Pytester, state: Path
) -> None:
    # It says that it offers SSH, and never does.
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.smolvm(boot_args="root=/dev/vda rdinit=/bin/sh init=/init panic=0")
        def test_never_boots(smolvm): pass

        def test_after_it(): pass
        """
    )
    run = start("--timeout=4", "--timeout-method=signal", "--smolvm-retain=none")
    output = end(run)
    assert "1 passed, 1 error" in output, output
    assert "Timeout" in output, output
    check_swept(state)


def test_a_run_that_pytest_timeout_ends_by_its_thread_leaves_nothing_running(
    pytester: pytest.Pytester, state: Path
) -> None:
    """It calls os._exit, so what is on the disk is the next run's to sweep."""
    pytester.makepyfile(HANGS)
    run = start("--timeout-method=thread")
    output = end(run)
    assert "Timeout" in output, output
    assert "test_hangs" in output, output  # it shows where everybody was
    check_swept(state)


@pytest.mark.parametrize("pause_s", [0.0, 0.01, 0.05, 0.2])
def test_ctrl_c_twice_ends_at_once_and_leaves_nothing_running(
    pytester: pytest.Pytester, state: Path, pause_s: float
) -> None:
    marker = pytester.path / "in-the-test"
    pytester.makepyfile(long_test(marker))
    with start("--smolvm-retain=none") as run:
        wait_for(marker.exists, run)
        os.killpg(run.pid, signal.SIGINT)
        try:
            run.wait(pause_s)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGINT)
        output = end(run)
    assert run.returncode in (pytest.ExitCode.INTERRUPTED, -signal.SIGINT), output
    check_swept(state)


def test_ctrl_c_twice_ends_the_workers_too(pytester: pytest.Pytester, state: Path) -> None:
    marker = pytester.path / "in-the-test"
    pytester.makepyfile(long_test(marker))
    with start("--smolvm-retain=none", "-n1") as run:
        wait_for(marker.exists, run)
        os.killpg(run.pid, signal.SIGINT)
        os.killpg(run.pid, signal.SIGINT)
        end(run)
    check_swept(state)


def test_faulthandler_shows_where_everybody_is_and_the_test_goes_on(
    pytester: pytest.Pytester, state: Path
) -> None:
    pytester.makepyfile(
        """
        def test_slow(smolvm):
            assert smolvm.run("sleep 3; echo done").output == "done"
        """
    )
    output = end(start("-o", "faulthandler_timeout=1"))
    assert "1 passed" in output, output
    assert "Timeout (0:00:01)!" in output, output
    check_swept(state)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_a_signal_ends_takes_its_machines_with_it(
    pytester: pytest.Pytester, state: Path, number: signal.Signals
) -> None:
    marker = pytester.path / "in-the-test"
    pytester.makepyfile(long_test(marker))
    with start() as run:
        wait_for(marker.exists, run)
        run.send_signal(number)
        output = end(run)
    assert run.returncode == -number, output
    check_swept(state)
