"""What of a configuration Firecracker cannot do is known before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_smolvm import SSH_BOOT_ARGS, VMConfig
from pytest_smolvm.fitting import not_on_firecracker
from pytest_smolvm.images.manifest import ImageManifest, write_manifest
from pytest_smolvm.limits import host_architecture
from pytest_smolvm.store import Store


@pytest.fixture
def config(tmp_path: Path) -> VMConfig:
    kernel, rootfs = tmp_path / "vmlinux", tmp_path / "rootfs.ext4"
    magic = {"x86_64": b"\x7fELF", "aarch64": bytes(0x38) + b"ARM\x64"}
    kernel.write_bytes(magic[host_architecture()].ljust(0x210, b"\0"))
    rootfs.write_bytes(b"rootfs")
    write_manifest(rootfs, ImageManifest(host_key="ssh-ed25519 AAAA", vsock=True))
    return VMConfig(kernel_path=kernel, rootfs_path=rootfs, boot_args=SSH_BOOT_ARGS)


def test_an_image_with_all_it_takes_fits(config: VMConfig) -> None:
    assert not_on_firecracker(config, None) == []
    assert not_on_firecracker(config.model_copy(update={"network": "nat"}), None) == []


def test_a_compressed_kernel_does_not(config: VMConfig) -> None:
    config.kernel_path.write_bytes(bytes(0x202) + b"HdrS")
    (problem,) = not_on_firecracker(config, None)
    assert "uncompressed ELF vmlinux" in problem


def test_an_image_without_vsock_does_not_where_ssh_is_wanted(config: VMConfig) -> None:
    write_manifest(config.rootfs_path, ImageManifest(host_key="ssh-ed25519 AAAA"))
    (problem,) = not_on_firecracker(config, None)
    assert "cannot be reached through vsock" in problem
    silent = config.model_copy(update={"boot_args": "console=ttyS0"})
    assert not_on_firecracker(silent, None) == []


def test_a_disk_that_qemu_kept_does_not(config: VMConfig, tmp_path: Path) -> None:
    directory = Store(tmp_path / "state").claim("vm-kept")
    try:
        assert not_on_firecracker(config, directory) == []
        directory.disk_of("raw").touch()
        assert not_on_firecracker(config, directory) == []
        directory.disk_of("qcow2").touch()
        (problem,) = not_on_firecracker(config, directory)
        assert "qcow2" in problem
    finally:
        directory.destroy()
