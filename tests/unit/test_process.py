"""Processes: tools that fail in words, machines that do not outlive their owner."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pytest_smolvm import SmolVMError
from pytest_smolvm.hostloop import await_result
from pytest_smolvm.identity import ProcessIdentity
from pytest_smolvm.process import (
    Deadline,
    MachineProcess,
    ToolError,
    find_tool,
    run_tool,
    wait_readable,
)


def test_a_tool_that_fails_shows_what_it_said() -> None:
    with pytest.raises(ToolError, match="exit status 3:\nno such luck"):
        run_tool(["sh", "-c", "echo no such luck >&2; exit 3"], timeout_s=10)


def test_a_tool_that_does_not_end_is_ended() -> None:
    with pytest.raises(ToolError, match=r"did not end within 0.1 s"):
        run_tool(["sleep", "60"], timeout_s=0.1)


def test_a_missing_tool_is_an_error_that_names_its_package() -> None:
    with pytest.raises(ToolError, match="apt-get install some-package"):
        find_tool("no-such-tool", "some-package")


def test_administrators_tools_are_found_without_their_folders_on_the_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert find_tool("mkfs.ext4", "e2fsprogs").endswith("sbin/mkfs.ext4")


def machine(tmp_path: Path, *argv: str) -> MachineProcess:
    return MachineProcess(argv, cwd=tmp_path, log=tmp_path / "log", pass_fds=[])


def test_a_machine_outlives_the_thread_that_asked_for_it(tmp_path: Path) -> None:
    started: list[MachineProcess] = []
    thread = threading.Thread(target=lambda: started.append(machine(tmp_path, "sleep", "60")))
    thread.start()
    thread.join()
    assert started[0].wait(0.3) is None
    started[0].kill()
    assert started[0].poll() == -signal.SIGKILL


def test_a_machines_end_and_output_are_seen(tmp_path: Path) -> None:
    process = machine(tmp_path, "sh", "-c", "echo last words; exit 5")
    assert process.wait(30) == 5
    assert process.output_tail() == "last words"


def wait_for_program(pid: int, name: bytes) -> None:
    deadline = Deadline(30)
    while Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0] != name:
        assert not deadline.passed()
        time.sleep(0.01)


SLOW_SETPRIV = """#!/bin/sh
sleep 1
PATH="${PATH#*:}" exec setpriv "$@"
"""


@pytest.mark.parametrize("moment", ["it runs", "its signal has not been asked for yet"])
def test_a_machine_dies_with_its_owner_though_that_was_killed(tmp_path: Path, moment: str) -> None:
    script = (
        "import sys, pathlib; from pytest_smolvm.process import MachineProcess\n"
        "d = pathlib.Path(sys.argv[1])\n"
        "p = MachineProcess(['sleep', '600'], cwd=d, log=d / 'log', pass_fds=[])\n"
        "print(p.pid, flush=True); sys.stdin.read()\n"
    )
    path = os.environ["PATH"]
    if moment != "it runs":
        slow = tmp_path / "setpriv"
        slow.write_text(SLOW_SETPRIV)
        slow.chmod(0o755)
        path = f"{tmp_path}:{path}"
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PATH": path},
    )
    with owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        pidfd = os.pidfd_open(pid)
        identity = ProcessIdentity.of(pid)
        assert identity is not None
        if moment == "it runs":
            wait_for_program(pid, b"sleep")
        owner.send_signal(signal.SIGKILL)
        owner.wait(30)
        readable = wait_readable(pidfd, 30)
        os.close(pidfd)
    assert readable
    assert not identity.is_alive()


def test_an_identity_is_not_that_of_a_later_process() -> None:
    own = ProcessIdentity.of(os.getpid())
    assert own is not None
    assert own.is_alive()
    other = ProcessIdentity(own.pid, own.start_ticks - 1)
    assert not other.is_alive()
    other.kill()  # would end this very test


def test_a_coroutine_past_its_time_is_an_error_that_names_it() -> None:
    import asyncio

    from pytest_smolvm import OperationTimeoutError

    with pytest.raises(OperationTimeoutError, match="a long wait"):
        await_result(asyncio.sleep(60), operation="a long wait", timeout_s=0.05)


@pytest.mark.parametrize("value", ["5", -1, float("nan"), None])
def test_a_deadline_takes_nothing_but_seconds(value: object) -> None:
    with pytest.raises(SmolVMError, match=rf"boot_timeout={value!r} is not valid: give seconds"):
        Deadline(value, "boot_timeout")  # type: ignore[arg-type]


def test_a_wait_works_for_descriptors_beyond_what_select_takes() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    reader, writer = os.pipe()
    high = fcntl.fcntl(reader, fcntl.F_DUPFD, 1100)
    try:
        assert not wait_readable(high, 0.01)
        os.write(writer, b"x")
        assert wait_readable(high, 10)
    finally:
        for descriptor in (reader, writer, high):
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
