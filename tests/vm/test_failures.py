"""A guest that does not come up, or goes down: promptly, and with all that is known."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_smolvm import (
    BackendError,
    OperationTimeoutError,
    SmolVM,
    VMConfig,
    VMState,
)
from pytest_smolvm.images import ext4
from pytest_smolvm.images.manifest import ImageManifest, write_manifest
from tests.conftest import changed, qemu_pids

# Far beyond what a boot takes: a test that waited it out would be noticed.
PATIENCE_S = 600.0


@pytest.fixture(autouse=True)
def nothing_is_left(micro: Any, state_dir: Path) -> Iterator[None]:
    before = qemu_pids()
    directories = set((state_dir / "vms").glob("*"))
    yield
    assert qemu_pids() == before
    assert set((state_dir / "vms").glob("*")) == directories


def start_fails(config: VMConfig) -> BackendError:
    vm = SmolVM(config)
    with pytest.raises(BackendError) as caught:
        vm.start(boot_timeout=PATIENCE_S)
    assert vm.status is VMState.ERROR
    return caught.value


@pytest.mark.parametrize("content", [b"", b"not a kernel\n" * 1000, b"\0" * 4096])
def test_a_file_that_is_no_kernel_is_refused_by_name(
    micro_config: VMConfig, tmp_path: Path, content: bytes
) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(content)
    error = start_fails(changed(micro_config, kernel_path=kernel))
    assert f"{kernel} is not a kernel" in str(error)


def test_a_program_that_is_no_kernel_is_refused_by_qemu(
    micro_config: VMConfig, tmp_path: Path
) -> None:
    error = start_fails(changed(micro_config, kernel_path=Path("/bin/true").resolve()))
    assert error.exit_status == 1
    assert "PVH" in str(error)
    assert "-kernel" in error.command_line
    assert str(error.command_line[0]) in str(error)


def test_a_guest_that_panics_while_booting_ends_the_start_at_once(
    micro_config: VMConfig,
) -> None:
    error = start_fails(
        changed(micro_config, boot_args="console=ttyS0 panic=1 root=/dev/nothing init=/init")
    )
    assert "kernel panicked" in str(error)
    assert "/dev/nothing cannot be mounted" in error.console_tail
    assert "Kernel panic" in error.console_tail
    assert error.exit_status == 0
    assert "qemu-system" in error.command_line[0]


def test_a_root_disk_without_the_init_is_named_on_the_console(micro_config: VMConfig) -> None:
    error = start_fails(
        changed(micro_config, boot_args="console=ttyS0 panic=1 init=/none init=/init init=/none")
    )
    assert "has no program /none to start" in error.console_tail


def test_a_root_disk_that_is_no_file_system_is_named_on_the_console(
    micro_config: VMConfig, tmp_path: Path
) -> None:
    rootfs = tmp_path / "noise"
    rootfs.write_bytes(os.urandom(1 << 20))
    write_manifest(rootfs, ImageManifest(host_key="ssh-ed25519 AAAA"))
    error = start_fails(changed(micro_config, rootfs_path=rootfs))
    assert "cannot be mounted" in error.console_tail


def test_a_machine_killed_while_booting_ends_the_start_at_once(micro_config: VMConfig) -> None:
    before = qemu_pids()

    def kill_it() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for pid in qemu_pids() - before:
                os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_it)
    killer.start()
    error = start_fails(micro_config)
    killer.join()
    assert error.exit_status == -signal.SIGKILL
    assert "9" in str(error)
    assert "-kernel" in error.command_line


def test_a_guest_without_an_ssh_server_is_waited_for_and_given_up(
    micro_config: VMConfig, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    for name in ("dev", "proc"):
        (tree / name).mkdir()
    busybox = tmp_path / "busybox"
    busybox.write_bytes(ext4_file(micro_config.rootfs_path, "/usr/bin/busybox"))
    (tree / "bin/busybox").write_bytes(busybox.read_bytes())
    (tree / "bin/busybox").chmod(0o755)
    (tree / "init").write_text("#!/bin/busybox sh\necho no server here\nexec sleep 10000\n")
    (tree / "init").chmod(0o755)
    rootfs = tmp_path / "rootfs.ext4"
    ext4.make_ext4(tree, rootfs, 32)
    write_manifest(rootfs, ImageManifest(host_key="ssh-ed25519 AAAA"))
    with pytest.raises(OperationTimeoutError) as caught:
        SmolVM(changed(micro_config, rootfs_path=rootfs)).start(boot_timeout=15)
    error = caught.value
    assert error.timeout_s == 15
    assert "SSH server" in error.operation
    assert "runs but does not answer" in str(error)
    assert "no server here" in str(error)
    assert "-kernel" in str(error)


def test_a_machine_that_dies_during_a_command_is_told_from_a_lost_connection(
    micro_config: VMConfig,
) -> None:
    before = qemu_pids()
    with SmolVM(micro_config) as vm:
        (pid,) = qemu_pids() - before
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
        with pytest.raises(BackendError, match="killed by signal 9") as caught:
            vm.run("sleep 100", timeout=PATIENCE_S)
        assert caught.value.exit_status == -9
        assert vm.status is VMState.ERROR
        with pytest.raises(BackendError, match="killed by signal 9"):
            vm.run("true")


def test_a_guest_that_switches_itself_off_is_stopped_and_starts_again(
    micro_config: VMConfig,
) -> None:
    with SmolVM(micro_config) as vm:
        vm.write_text("/root/file", "kept")
        with pytest.raises(BackendError, match="switched itself off"):
            vm.run("poweroff; sleep 60", timeout=PATIENCE_S)
        assert vm.status is VMState.STOPPED
        assert vm.start().read_text("/root/file") == "kept"


def ext4_file(image: Path, path: str) -> bytes:
    import subprocess

    return subprocess.run(
        ["debugfs", "-R", f"cat {path}", str(image)], capture_output=True, check=True
    ).stdout
