"""Guests with another processor than the host's, on emulated machines of their kind."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pytest_smolvm import ImageBuilder, ImageError, SmolVM, VMConfig
from pytest_smolvm.limits import host_architecture
from tests.conftest import cli

pytestmark = pytest.mark.skipif(
    host_architecture() != "x86_64", reason="arm64 is this host's own kind"
)


@pytest.fixture(scope="module")
def arm64(state_dir: Path) -> tuple[Path, Path]:
    return ImageBuilder(progress=lambda _: None).build("micro", arch="aarch64")


def test_micro_of_arm64_boots_is_restored_and_reboots(arm64: tuple[Path, Path]) -> None:
    config = VMConfig(
        kernel_path=arm64[0],
        rootfs_path=arm64[1],
        backend="qemu",
        # As the reference has it.
        boot_args="console=ttyAMA0 reboot=k panic=1 init=/init",
        mem_size_mib=256,
    )
    with SmolVM(config):
        pass
    with SmolVM(config.model_copy(update={"vm_id": "arm64-again"})) as vm:
        assert vm.restored, vm.troubles
        assert vm.run("uname -m; hostname").stdout == "aarch64\narm64-again\n"
        assert abs(float(vm.run("date +%s").output) - time.time()) < 3
        assert "ttyAMA0" in vm.run("cat /sys/class/tty/console/active").output
        vm.run("echo kept > /root/kept").check()
        vm.reboot()
        assert vm.run("cat /root/kept").output == "kept"
        vm.stop(60)
        assert "Power down" in vm.console


def test_the_images_of_both_kinds_are_two(
    arm64: tuple[Path, Path], micro: tuple[Path, Path]
) -> None:
    assert arm64[1] != micro[1]
    assert str(arm64[1]) in cli("image", "build", "micro", "--arch", "aarch64").stdout
    assert str(micro[1]) in cli("image", "build", "micro").stdout
    said = cli("image", "build", "micro", "--arch", "arm", expected=2).stderr
    assert "'arm' is not one of 'x86_64', 'aarch64'" in said


def test_debian_for_another_processor_is_refused(state_dir: Path) -> None:
    with pytest.raises(ImageError, match=r"'debian' can be had for this host's processor only"):
        ImageBuilder(progress=lambda _: None).build("debian", arch="aarch64")
    with pytest.raises(ImageError, match="arch='arm' is not valid: use one of x86_64, aarch64"):
        ImageBuilder(progress=lambda _: None).build_micro_ssh_key(arch="arm")
