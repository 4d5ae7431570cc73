"""What a machine's process may not do, tried by a process that is started as one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pytest_smolvm import confinement
from pytest_smolvm.confinement import Limits
from pytest_smolvm.process import MachineProcess

LIMITS = Limits(data_bytes=256 << 20, file_bytes=1 << 20)


def run(tmp_path: Path, code: str, limits: Limits | None = LIMITS) -> tuple[int | None, str]:
    process = MachineProcess(
        [sys.executable, "-c", code], cwd=tmp_path, log=tmp_path / "log", pass_fds=[], limits=limits
    )
    status = process.wait(30)
    return status, process.output_tail()


def test_memory_and_files_have_an_end(tmp_path: Path) -> None:
    status, said = run(tmp_path, "bytearray(200 << 20); bytearray(400 << 20)")
    assert status == 1
    assert "MemoryError" in said
    status, said = run(tmp_path, "open('file', 'wb').write(bytes(2 << 20))")
    assert status != 0
    assert (tmp_path / "file").stat().st_size <= 1 << 20


def test_limits_that_are_lower_already_stay(tmp_path: Path) -> None:
    code = (
        "import resource as r, subprocess, sys\n"
        "r.setrlimit(r.RLIMIT_FSIZE, (4096, 4096))\n"
        f"line = {confinement.ulimits(LIMITS)!r} + 'ulimit -f'\n"
        "print(subprocess.run(['/bin/sh', '-c', line], capture_output=True, text=True).stdout)\n"
    )
    status, said = run(tmp_path, code, None)
    assert (status, said) == (0, "8")


def test_rights_are_given_up_for_good(tmp_path: Path) -> None:
    status, said = run(tmp_path, "print(open('/proc/self/status').read())")
    assert status == 0
    facts = dict(line.split(":", 1) for line in said.splitlines() if ":" in line)
    assert facts["NoNewPrivs"].strip() == "1"
    # CAP_DAC_READ_SEARCH (2) and CAP_NET_BIND_SERVICE (10), and those of root's alone.
    expected = 1 << 2 | 1 << 10 if os.geteuid() == 0 else 0
    for kind in ("CapEff", "CapPrm") + (("CapBnd",) if os.geteuid() == 0 else ()):
        assert int(facts[kind], 16) == expected, kind


def test_it_gets_no_secret_of_our_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "secret")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    status, said = run(tmp_path, "import os; print(sorted(os.environ))")
    assert status == 0
    assert "GITHUB_TOKEN" not in said
    assert "'LC_ALL'" in said
    assert "'PATH'" in said


def test_where_there_is_no_setpriv_the_limits_hold_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confinement.shutil, "which", lambda _: None)
    status, said = run(tmp_path, "bytearray(400 << 20)")
    assert status == 1
    assert "MemoryError" in said
