"""Runs of pytest on Firecracker, chosen as a user would: by option, or by its being there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pytest_smolvm.limits import host_architecture
from tests.contract.conftest import REAL, processes_in, write_standin

SUITE = """
import pytest

def test_one(smolvm):
    assert smolvm.backend_name == "firecracker"
    assert smolvm.run("hostname").output == smolvm.vm_id
    smolvm.run("touch /root/canary").check()

@pytest.mark.smolvm(env_vars={"MODE": "test"}, network="nat")
def test_two(smolvm):
    assert smolvm.backend_name == "firecracker"
    assert smolvm.run("echo $MODE").output == "test"
    assert not smolvm.run("ls /root/canary").ok

def test_three(smolvm):
    assert not smolvm.run("ls /root/canary").ok
    assert 0, "on purpose"
"""


@pytest.fixture
def firecracker_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host with KVM: a Firecracker, and a QEMU whose KVM runs a guest."""
    if host_architecture() != "x86_64" or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("takes a /dev/kvm that opens, whatever it is good for")
    folder = tmp_path / "programs"
    if REAL:
        folder.mkdir()
        (folder / "firecracker").symlink_to(REAL)
    else:
        write_standin(folder / "firecracker")
        qemu = shutil.which("qemu-system-x86_64")
        script = f'#!/bin/sh\ncase "$*" in *"-accel kvm"*) exit 85 ;; esac\nexec {qemu} "$@"\n'
        (folder / "qemu-system-x86_64").write_text(script)
        (folder / "qemu-system-x86_64").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("arguments", [["--smolvm-backend=firecracker"], []])
@pytest.mark.usefixtures("firecracker_on_path")
def test_a_run_is_on_firecracker(
    pytester: pytest.Pytester, no_vms: Path, arguments: list[str]
) -> None:
    pytester.makepyfile(SUITE)
    result = pytester.runpytest_subprocess("--smolvm-retain=none", *arguments)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        ["smolvm: firecracker 1.*, kvm (*/firecracker, on a KVM that ran a guest), image micro"]
    )
    result.stdout.fnmatch_lines(["*console of vm-*", "*VMs: * booted, * restored*"])
    assert not list((no_vms / "vms").glob("*/"))
    assert not processes_in(no_vms)
