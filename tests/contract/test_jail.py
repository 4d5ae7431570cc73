"""Machines in a jail, as far as a stand-in for Firecracker's jailer can show it.

What that checks is how it is called (docs/jailer.md in Firecracker's sources), and that all that
the machine needs lies in its jail, by names in there. It does not change its root, nor its user.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytest_smolvm import BackendError, SmolVM, VMConfig, vm
from pytest_smolvm.backends.firecracker import FirecrackerBackend
from pytest_smolvm.store import shared_store
from tests.conftest import changed
from tests.contract.conftest import processes_in, wait_until_gone, write_standin

USER = 65534

JAILER = """
import argparse, os, sys
from pathlib import Path
parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("id", "exec-file", "uid", "gid", "chroot-base-dir", "cgroup-version"):
    parser.add_argument(f"--{name}", required=True)
parser.add_argument("rest", nargs="*")
options = parser.parse_args()
program = Path(options.exec_file)
assert "firecracker" in program.name and not program.is_symlink()
root = Path(options.chroot_base_dir, program.name, options.id, "root")
root.mkdir(parents=True, exist_ok=True)
(root / "dev").mkdir()  # fails in a jail that was used before
os.chown(root, int(options.uid), int(options.gid))
os.chdir(root)
os.execv(program, [str(program), "--id", options.id, *options.rest])
"""


@pytest.fixture
def jailed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_config: VMConfig
) -> FirecrackerBackend:
    if os.geteuid() != 0:
        pytest.skip("the jailer takes root")
    folder = tmp_path / "programs"
    # Installed as releases are: a link to what has the release in its name.
    folder.mkdir()
    (folder / "firecracker").symlink_to("firecracker-v1.16.1")
    binary = folder / "firecracker"
    write_standin(
        folder / "firecracker-v1.16.1",
        f"--standin-record={tmp_path / 'record'}",
        f"--standin-kernel={micro_config.kernel_path}",
        f"--standin-initrd={micro_config.effective_initrd_path()}",
    )
    (folder / "jailer.py").write_text(JAILER)
    (folder / "jailer").write_text(f'#!/bin/sh\nexec {sys.executable} {folder}/jailer.py "$@"\n')
    (folder / "jailer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SMOLVM_JAILER", f"{USER}:{USER}")
    backend = FirecrackerBackend(str(binary), "x86_64")
    monkeypatch.setattr(vm, "choose", lambda *_, **__: backend)
    return backend


@pytest.mark.usefixtures("jailed", "no_templates")
def test_a_life_in_jail(micro_config: VMConfig, tmp_path: Path) -> None:
    with SmolVM(micro_config) as first:
        jail = first.directory / "jail/firecracker-v1.16.1" / first.vm_id / "root"
        assert processes_in(jail)
        assert jail.stat().st_uid == USER
        assert {path.stat().st_uid for path in jail.glob("*disk*")} == {USER}
        assert first.templates_made == 1
        first.run("echo stays > /root/stays; sync").check()
        first.reboot()
        assert first.run("cat /root/stays").output == "stays"
        first.stop()
        wait_until_gone(first.directory)
        assert not (first.directory / "jail").exists(), "what was brought there is copies"
        first.start()
        assert first.run("cat /root/stays").output == "stays"
        directory = first.directory
    wait_until_gone(directory)
    assert not directory.exists()
    with SmolVM(changed(micro_config, vm_id="vm-in-jail")) as second:
        assert second.restored
        assert not second.run("cat /root/stays").ok
    asked = (tmp_path / "record").read_text()
    # Nothing that is asked for lies outside.
    assert "_path" in asked
    assert '_path\\": \\"/' not in asked
    assert micro_config.kernel_path.stat().st_uid == 0, "the image's own is left alone"


_OWNER = """
import sys, time
from pytest_smolvm import SmolVM, VMConfig, vm
from pytest_smolvm.backends.firecracker import FirecrackerBackend
backend = FirecrackerBackend(sys.argv[1], "x86_64")
vm.choose = lambda *_, **__: backend
SmolVM(VMConfig.model_validate_json(sys.argv[2])).start()
print("up", flush=True)
time.sleep(600)
"""


def test_a_jailed_one_does_not_outlive_its_owner(
    jailed: FirecrackerBackend, micro_config: VMConfig
) -> None:
    config = changed(micro_config, vm_id="vm-jailed")
    command = [sys.executable, "-c", _OWNER, jailed.binary, config.model_dump_json()]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    directory = shared_store().vms / "vm-jailed"
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        assert processes_in(directory)
    finally:
        owner.kill()
        owner.communicate()
    wait_until_gone(directory)
    until = time.monotonic() + 10
    while directory.exists() and time.monotonic() < until:
        shared_store().sweep()
    assert not directory.exists()


@pytest.mark.parametrize("value", ["yes", "0:0", "1000:0", "00:5", "1000", "-1:5", "root:root"])
def test_a_wrong_value_is_answered_with_a_right_one(
    jailed: FirecrackerBackend,
    micro_config: VMConfig,
    monkeypatch: pytest.MonkeyPatch,
    value: str,
) -> None:
    monkeypatch.setenv("SMOLVM_JAILER", value)
    machine = SmolVM(micro_config, restore=False)
    with pytest.raises(BackendError, match=r"SMOLVM_JAILER='.*' is not valid: .*1000:1000"):
        machine.start()
    assert not (shared_store().vms / machine.vm_id).exists()


@pytest.mark.usefixtures("jailed")
def test_what_cannot_be_had_in_jail_is_said(
    micro_config: VMConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match="'nat' and the jailer cannot be had together"):
        SmolVM(changed(micro_config, network="nat"), restore=False).start()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        with pytest.raises(BackendError, match="no program called 'jailer' is on PATH"):
            SmolVM(changed(micro_config, vm_id="vm-unjailed"), restore=False).start()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BackendError, match="jailer, which takes root"):
        SmolVM(changed(micro_config, vm_id="vm-nobody"), restore=False).start()
