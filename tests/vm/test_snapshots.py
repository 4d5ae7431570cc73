"""Snapshots of running VMs: others start from there, and they themselves go back."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

import pytest

from pytest_smolvm import SmolVM, SmolVMError, Template, VMConfig, VMState
from tests.conftest import changed

SERVICE = "for f in /root/file /run/file; do echo saved > $f; done; sleep 999 & echo $! > /run/pid"


@pytest.fixture(scope="module")
def vm(micro: tuple) -> Iterator[SmolVM]:  # type: ignore[type-arg]
    from pytest_smolvm import SSH_BOOT_ARGS

    config = VMConfig(
        kernel_path=micro[0],
        rootfs_path=micro[1],
        boot_args=SSH_BOOT_ARGS,
        mem_size_mib=256,
        env_vars={"KIND": "source"},
    )
    with SmolVM(config) as vm:
        vm.run(SERVICE, check=True)
        yield vm


@pytest.fixture(scope="module")
def saved(vm: SmolVM) -> Template:
    return vm.snapshot()


def test_the_vm_goes_on_as_it_was(vm: SmolVM) -> None:
    facts = "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id; kill -0 $(cat /run/pid)"
    before = vm.run(facts, check=True).stdout
    template = vm.snapshot()
    assert vm.run(facts, check=True).stdout == before
    template.delete()


def test_another_starts_with_its_files_and_processes(vm: SmolVM, saved: Template) -> None:
    with SmolVM.from_template(saved) as other:
        assert other.restored
        assert other.read_text("/root/file") == other.read_text("/run/file") == "saved\n"
        assert other.run("cat /proc/$(cat /run/pid)/comm").output == "sleep"
        assert other.run("echo $KIND").output == "source"
        # What is its own is its own.
        assert other.run("hostname").output == other.vm_id != vm.vm_id
        for path in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"):
            assert other.read_text(path) != vm.read_text(path)
        other.write_text("/root/file", "other\n")
    with SmolVM.from_template(saved, vm_id="third") as third:
        assert third.vm_id == "third"
        assert third.read_text("/root/file") == "saved\n"


def test_going_back_undoes_all_and_keeps_the_ports(vm: SmolVM, saved: Template) -> None:
    port = vm.expose_local(22)
    vm.run("rm -r /root/file /run/file; kill $(cat /run/pid); echo new > /root/new", check=True)
    assert vm.restore(saved) is vm
    assert vm.status is VMState.RUNNING
    assert vm.read_text("/root/file") == vm.read_text("/run/file") == "saved\n"
    assert vm.run("kill -0 $(cat /run/pid); ls /root/new").stderr.count("No such file") == 1
    assert vm.run("hostname").output == vm.vm_id
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        assert connection.recv(4) == b"SSH-"
    vm.unexpose_local(port)


def test_a_snapshot_of_a_vm_that_began_with_one(saved: Template) -> None:
    with SmolVM.from_template(saved) as second:
        second.write_text("/root/second", "second\n")
        template = second.snapshot()
        assert len(template.facts.layers) == len(saved.facts.layers) + 1
        second.stop().start()  # its disk goes on without any of them
        assert second.read_text("/root/file") == "saved\n"
    with SmolVM.from_template(template) as third:
        assert third.read_text("/root/file") == "saved\n"
        assert third.read_text("/root/second") == "second\n"
    template.delete()


def test_a_kept_vm_of_a_snapshot_boots_from_its_disk_when_that_is_gone(saved: Template) -> None:
    with SmolVM.from_template(saved, vm_id="kept-of-snapshot") as vm:
        vm.write_text("/root/own", "own\n")
        template = vm.snapshot()
        vm.retain("to be looked at")
    template.delete()
    again = SmolVM.from_id("kept-of-snapshot").start()
    assert again.read_text("/root/file") == "saved\n"
    assert again.read_text("/root/own") == "own\n"
    again.delete()
    again._store.remove("kept-of-snapshot")


def test_what_cannot_be_saved_is_told(micro_config: VMConfig, vm: SmolVM) -> None:
    with pytest.raises(SmolVMError, match="start\\(\\) it before you take a snapshot"):
        SmolVM(changed(micro_config, vm_id="never-started")).snapshot()
    SmolVM.from_id("never-started").delete()
    with (
        SmolVM(changed(micro_config, vm_id="shared", disk_mode="shared")) as shared,
        pytest.raises(SmolVMError, match="its disk is shared with other VMs"),
    ):
        shared.snapshot()
    vm.pause()
    with pytest.raises(SmolVMError, match="is paused: resume\\(\\) it first"):
        vm.snapshot()
    vm.resume()
    assert vm.run("true").ok


def test_a_template_of_another_machine_is_refused_and_harms_nothing(
    micro_config: VMConfig, saved: Template
) -> None:
    with SmolVM(changed(micro_config, vm_id="other-size", mem_size_mib=192)) as other:
        text = re.escape(f"the template {saved.key} was made of a VM of another configuration")
        with pytest.raises(SmolVMError, match=text):
            other.restore(saved)
        assert other.run("true").ok


def test_a_template_that_was_deleted_is_an_error_that_says_so(vm: SmolVM) -> None:
    template = vm.snapshot()
    template.delete()
    with pytest.raises(SmolVMError, match="is gone: it was deleted"):
        vm.restore(template)
    late = SmolVM.from_template(template)
    with pytest.raises(SmolVMError, match="is gone: it was deleted"):
        late.start()
    assert vm.run("true").ok
