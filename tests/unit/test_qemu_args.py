"""The command lines: QEMU's and the kernel's, from pure functions."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from pytest_smolvm.backends.base import MachineSpec
from pytest_smolvm.backends.qemu_args import ARCHITECTURES, kernel_command_line, qemu_argv
from pytest_smolvm.disks import Disk, Image

X86 = ARCHITECTURES["x86_64"]
ARM = ARCHITECTURES["aarch64"]


def argv(**changes: Any) -> list[str]:
    fields: dict[str, Any] = {
        "vm_id": "vm-1",
        "directory": Path("/state/vm-1"),
        "kernel": Path("/images/vmlinux"),
        "initrd": Path("/images/vmlinux.initrd"),
        "boot_args": "console=ttyS0",
        "vcpu_count": 1,
        "mem_size_mib": 256,
        "disk": Disk(
            Image(Path("/state/vm-1/disk.qcow2"), "qcow2"), (Image(Path("/images/root"), "raw"),)
        ),
        "network": "isolated",
        "accelerator": "tcg",
        "console": Path("/state/vm-1/console.log"),
        "machine_log": Path("/state/vm-1/machine.log"),
    }
    architecture = changes.pop("architecture", X86)
    spec = MachineSpec(**{**fields, **changes})
    return qemu_argv(spec, architecture, binary="qemu", monitor_fd=7, port_fd=8, console_fd=9)


def value(arguments: list[str], option: str, containing: str = "") -> str:
    found = [
        after
        for before, after in itertools.pairwise(arguments)
        if before == option and containing in after
    ]
    assert len(found) == 1, f"{option} with {containing!r}: {found}"
    return found[0]


def test_nothing_comes_from_qemus_defaults_or_the_users_files() -> None:
    assert {"-nodefaults", "-no-user-config"} <= set(argv())


def test_the_sandbox_is_on_and_denies_all_that_can_be_denied() -> None:
    assert value(argv(), "-sandbox") == (
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    )


def test_the_only_listener_is_on_the_loopback_at_a_port_of_the_kernels_choice() -> None:
    network = value(argv(), "-netdev")
    assert "hostfwd=tcp:127.0.0.1:0-10.0.2.15:22" in network
    assert network.count("hostfwd") == 1
    assert value(argv(), "-chardev", "monitor") == "socket,id=monitor,fd=7"


@pytest.mark.parametrize(("network", "restrict"), [("isolated", "on"), ("nat", "off")])
def test_an_isolated_network_is_restricted(network: str, restrict: str) -> None:
    assert f"restrict={restrict}" in value(argv(network=network), "-netdev")


def test_the_root_image_under_an_overlay_is_read_only() -> None:
    node = json.loads(value(argv(), "-blockdev"))
    assert node["driver"] == "qcow2"
    assert node["read-only"] is False
    assert node["backing"]["file"]["filename"] == "/images/root"
    assert node["backing"]["read-only"] is True
    assert node["backing"]["file"]["read-only"] is True


def test_a_shared_disk_is_read_only() -> None:
    arguments = argv(disk=Disk(Image(Path("/images/root"), "raw"), read_only=True))
    node = json.loads(value(arguments, "-blockdev"))
    assert node["read-only"] is True
    assert node["file"]["read-only"] is True
    assert " ro" in value(arguments, "-append")


def test_a_qcow2_image_is_never_followed_to_another_file() -> None:
    node = json.loads(
        value(argv(disk=Disk(Image(Path("/i.qcow2"), "qcow2"), read_only=True)), "-blockdev")
    )
    assert node["backing"] is None


def test_no_initrd_is_passed_when_there_is_none() -> None:
    assert "-initrd" not in argv(initrd=None)
    assert value(argv(), "-initrd") == "/images/vmlinux.initrd"


def test_emulated_processors_share_a_thread_when_there_are_several() -> None:
    assert value(argv(vcpu_count=1), "-accel") == "tcg"
    assert value(argv(vcpu_count=2), "-accel") == "tcg,thread=single"
    assert value(argv(vcpu_count=2, accelerator="kvm"), "-accel") == "kvm"


def test_the_processor_is_the_hosts_under_kvm_only() -> None:
    assert value(argv(accelerator="kvm"), "-cpu") == "host"
    assert value(argv(), "-cpu") == "max"


def test_memory_and_processors_are_those_asked_for() -> None:
    arguments = argv(vcpu_count=3, mem_size_mib=1024)
    assert value(arguments, "-smp") == "3"
    assert value(arguments, "-m") == "1024M"


def test_an_arm_guest_gets_a_machine_that_arm_has() -> None:
    assert value(argv(architecture=ARM), "-machine").startswith("virt")


@pytest.mark.parametrize(
    ("asked", "settled"),
    [
        (
            "console=ttyS0 reboot=k panic=1 pci=off root=/dev/vda rw init=/init",
            "console=ttyS0 reboot=t panic=1 root=/dev/vda rw init=/init",
        ),
        (
            "console=ttyAMA0 reboot=k panic=1 init=/init",
            "console=ttyS0 reboot=t panic=1 init=/init root=/dev/vda rw",
        ),
        ("", "console=ttyS0 root=/dev/vda rw panic=1"),
        ("console=ttyS0,115200n8 panic=0", "console=ttyS0,115200n8 panic=0 root=/dev/vda rw"),
        (
            "console=tty0 console=ttyS1 root=LABEL=x ro",
            "console=tty0 console=ttyS0 root=LABEL=x ro panic=1",
        ),
        ("quiet foo.pci=off", "console=ttyS0 quiet foo.pci=off root=/dev/vda rw panic=1"),
    ],
)
def test_boot_arguments_are_a_request_that_the_machine_settles(asked: str, settled: str) -> None:
    assert kernel_command_line(asked, X86, read_only=False) == settled


def test_the_serial_console_of_an_arm_machine_is_its_own() -> None:
    line = kernel_command_line("console=ttyS0 reboot=k", ARM, read_only=False)
    assert line.split()[:2] == ["console=ttyAMA0", "reboot=k"]


def test_a_read_only_disk_is_mounted_read_only_whatever_was_asked() -> None:
    assert "ro" in kernel_command_line("rw", X86, read_only=True).split()
    assert "rw" not in kernel_command_line("rw", X86, read_only=True).split()
