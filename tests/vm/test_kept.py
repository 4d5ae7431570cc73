"""VMs that are kept to be looked at: what lies there, and the way back in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_smolvm import BackendError, SmolVM, SmolVMError, VMConfig
from pytest_smolvm.records import Usage, read_record
from pytest_smolvm.store import shared_store
from tests.conftest import changed


@pytest.fixture
def kept(micro_config: VMConfig, no_vms: Path) -> Path:
    """A VM that was kept while something that it wrote was still on its way to the disk."""
    vm = SmolVM(micro_config).start()
    vm.usage = Usage(test="tests/test_a.py::test_one", project="/the/project")
    vm.run("echo canary > /root/canary; exit 3")
    vm.run(["echo", "to the error stream", "a b"])
    return vm.retain("the test failed")


def test_a_kept_directory_explains_itself(kept: Path) -> None:
    assert {path.name for path in kept.iterdir()} >= {
        "vm.json",
        "disk.qcow2",
        "console.log",
        "commands.jsonl",
        "README.txt",
    }
    text = (kept / "README.txt").read_text()
    state = kept.parent.parent
    for wanted in (
        "the test failed",
        "tests/test_a.py::test_one",
        f"pytest-smolvm --state-dir {state} ssh {kept.name}",
        f"pytest-smolvm --state-dir {state} rm {kept.name}",
        "disk.qcow2",
    ):
        assert wanted in text
    first, second = map(json.loads, (kept / "commands.jsonl").read_text().splitlines())
    assert (first["command"], first["exit_code"]) == ("echo canary > /root/canary; exit 3", 3)
    assert second["command"] == "echo 'to the error stream' 'a b'"
    assert second["stdout"] == "to the error stream a b\n"
    assert 0 < second["duration_s"] < second["at"]
    record = read_record(kept)
    assert record is not None
    assert record.retained is not None
    assert record.status == "stopped"
    assert record.machine_pid is None
    assert not shared_store().is_owned(kept.name)
    assert shared_store().sweep() == []


def test_a_kept_vm_boots_again_with_what_it_had_written_and_is_kept_again(kept: Path) -> None:
    with SmolVM.from_id(kept.name) as vm:
        assert vm.read_text("/root/canary") == "canary\n"
        vm.write_text("/root/second", "visit")
    assert (kept / "console.1.log").exists()
    assert "the test failed" in (kept / "README.txt").read_text()
    with SmolVM.from_id(kept.name) as vm:
        assert vm.read_text("/root/second") == "visit"


def test_a_new_vm_of_the_same_id_gets_a_fresh_disk_and_the_kept_one_moves_aside(
    kept: Path, micro_config: VMConfig
) -> None:
    with SmolVM(changed(micro_config, vm_id=kept.name)) as vm:
        assert not vm.run("ls /root/canary").ok
        (aside,) = [path for path in kept.parent.iterdir() if path != kept]
    assert aside.name.startswith(f"{kept.name}-")
    assert f"ssh {aside.name}" in (aside / "README.txt").read_text()
    with SmolVM.from_id(aside.name) as vm:
        assert vm.read_text("/root/canary") == "canary\n"


def test_a_boot_that_failed_can_be_kept(micro_config: VMConfig, no_vms: Path) -> None:
    config = changed(micro_config, boot_args="panic=1 root=/dev/nothing init=/init")
    vm = SmolVM(config)
    with pytest.raises(BackendError, match="panicked"):
        vm.start(keep_failed=True)
    path = vm.retain("it did not boot")
    assert "Kernel panic" in (path / "console.log").read_text(errors="replace")
    assert "it did not boot" in (path / "README.txt").read_text()
    with pytest.raises(SmolVMError, match="was deleted"):
        vm.start()


def test_a_paused_vm_is_kept_whole(micro_config: VMConfig, no_vms: Path) -> None:
    vm = SmolVM(micro_config).start()
    vm.write_text("/root/canary", "canary")
    vm.pause()
    vm.retain()
    with SmolVM.from_id(vm.vm_id) as again:
        assert again.read_text("/root/canary") == "canary"
