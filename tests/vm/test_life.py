"""The life of a VM: create, start, stop, pause, reboot, delete; its disk and its id."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from pydantic import ValidationError

from pytest_smolvm import (
    BackendError,
    CommandExecutionUnavailableError,
    ImageError,
    SmolVM,
    SmolVMError,
    VMAlreadyExistsError,
    VMConfig,
    VMNotFoundError,
    VMState,
)
from tests.conftest import changed, qemu_pids


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_whole_life(micro_config: VMConfig, state_dir: Path) -> None:
    image_before = sha256(micro_config.rootfs_path)
    others = qemu_pids()
    vm = SmolVM(micro_config)
    assert vm.status is VMState.CREATED
    with pytest.raises(SmolVMError, match=r"is created: start\(\) it first"):
        vm.run("true")
    directory = state_dir / "vms" / vm.vm_id

    assert vm.start() is vm
    assert vm.status is VMState.RUNNING
    assert SmolVM.from_id(vm.vm_id) is vm
    assert vm.wait_for_ssh() is vm
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for path in directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or path.suffix == ".qcow2"
    with pytest.raises(SmolVMError, match="already running"):
        vm.start()
    vm.write_text("/root/file", "before")
    vm.set_env_vars({"KEY": "value"})

    assert vm.pause().status is VMState.PAUSED
    with pytest.raises(SmolVMError, match=r"is paused: resume\(\) it first"):
        vm.run("true")
    assert vm.resume().run("cat /root/file").output == "before"

    first_boot = vm.read_text("/proc/sys/kernel/random/boot_id")
    assert vm.reboot().read_text("/proc/sys/kernel/random/boot_id") != first_boot
    assert vm.run("cat /root/file; echo $KEY").output == "before\nvalue" or (
        vm.run("cat /root/file; echo; echo $KEY").stdout.split() == ["before", "value"]
    )
    second_boot = vm.read_text("/proc/sys/kernel/random/boot_id")
    vm.run("sync")
    assert vm.reboot(force=True).read_text("/proc/sys/kernel/random/boot_id") != second_boot
    assert vm.read_text("/root/file") == "before"

    assert vm.stop().status is VMState.STOPPED
    assert qemu_pids() == others
    with pytest.raises(SmolVMError, match="is stopped"):
        vm.run("true")
    assert vm.start().read_text("/root/file") == "before"

    vm.delete()
    vm.delete()
    assert vm.status is VMState.STOPPED
    assert not directory.exists()
    assert qemu_pids() == others
    assert "Linux version" in vm.console
    for action in (vm.start, lambda: vm.run("true")):
        with pytest.raises(SmolVMError, match="was deleted"):
            action()
    with pytest.raises(VMNotFoundError, match=vm.vm_id):
        SmolVM.from_id(vm.vm_id)
    assert sha256(micro_config.rootfs_path) == image_before


def test_vms_of_one_image_do_not_see_each_others_disks(micro_config: VMConfig) -> None:
    other = changed(micro_config, vm_id="other-vm")
    with SmolVM(micro_config) as one, SmolVM(other) as two:
        one.write_text("/root/canary", "one")
        assert not two.run("ls /root/canary").ok
        assert one.run("hostname").ok


def test_no_vm_leaves_a_logger_behind(micro_config: VMConfig) -> None:
    """Loggers live for as long as the process."""
    names = []
    for vm_id in ("one", "two"):
        with SmolVM(changed(micro_config, vm_id=vm_id)) as vm:
            vm.run("true", check=True)
        names.append(set(logging.root.manager.loggerDict))
    assert names[0] == names[1]


def test_an_id_is_taken_while_its_vm_lives(micro_config: VMConfig) -> None:
    vm = SmolVM(micro_config)
    try:
        with pytest.raises(VMAlreadyExistsError, match=vm.vm_id):
            SmolVM(micro_config)
    finally:
        vm.delete()
    SmolVM(micro_config).delete()


def test_a_vm_is_deleted_whatever_happens_inside(micro_config: VMConfig, state_dir: Path) -> None:
    others = qemu_pids()
    with pytest.raises(KeyboardInterrupt), SmolVM(micro_config) as vm:
        raise KeyboardInterrupt
    assert vm.status is VMState.STOPPED
    assert qemu_pids() == others
    assert not (state_dir / "vms" / vm.vm_id).exists()


def test_the_constructors_arguments_override_the_configuration(micro_config: VMConfig) -> None:
    vm = SmolVM(micro_config, vm_id="by-argument", backend="qemu", mem_size_mib=300)
    assert (vm.vm_id, vm.config.backend, vm.config.mem_size_mib) == ("by-argument", "qemu", 300)
    vm.delete()
    with pytest.raises(ValidationError, match="mem_size_mib"):
        SmolVM(micro_config, mem_size_mib=1)
    with pytest.raises(ValidationError, match="vcpu_count"):
        SmolVM(changed(micro_config, vcpu_count=99))


def test_without_a_configuration_the_default_image_boots() -> None:
    with SmolVM(mem_size_mib=256) as vm:
        assert "smolvm micro" in vm.run("cat /etc/os-release").stdout


def test_a_vm_of_another_process_can_be_worked_in_but_not_ended(
    micro_config: VMConfig, state_dir: Path
) -> None:
    with SmolVM(micro_config) as vm:
        script = textwrap.dedent(
            """
            import sys
            from pytest_smolvm import SmolVM, SmolVMError
            vm = SmolVM.from_id(sys.argv[1])
            print(vm.status, vm.run("echo joined").output, "ssh" in vm.ssh_commands()["ssh"])
            vm.write_text("/root/from-afar", "text")
            for action in (vm.stop, vm.delete, vm.pause, vm.start, vm.reboot):
                try:
                    action()
                except SmolVMError as error:
                    print("belongs to process" in str(error))
            """
        )
        done = subprocess.run(
            [sys.executable, "-c", script, vm.vm_id],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.stdout.split() == ["running", "joined", "True", *["True"] * 5], done.stderr
        assert vm.status is VMState.RUNNING
        assert vm.read_text("/root/from-afar") == "text"


def test_a_process_that_forgets_its_vm_leaves_nothing(
    micro_config: VMConfig, state_dir: Path
) -> None:
    others = qemu_pids()
    script = textwrap.dedent(
        """
        import sys
        from pytest_smolvm import SmolVM, VMConfig
        vm = SmolVM(VMConfig.model_validate_json(sys.argv[1])).start()
        print(vm.vm_id)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, micro_config.model_dump_json()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == micro_config.vm_id
    assert not (state_dir / "vms" / micro_config.vm_id).exists()
    assert qemu_pids() == others


def test_a_process_killed_with_signal_9_takes_its_vm_along(
    micro_config: VMConfig, state_dir: Path
) -> None:
    others = qemu_pids()
    script = textwrap.dedent(
        """
        import sys
        from pytest_smolvm import SmolVM, VMConfig
        vm = SmolVM(VMConfig.model_validate_json(sys.argv[1])).start()
        print("started", flush=True)
        sys.stdin.read()
        """
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, micro_config.model_dump_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"started\n"
        (qemu,) = qemu_pids() - others
        pidfd = os.pidfd_open(qemu)
        owner.send_signal(signal.SIGKILL)
        owner.wait(30)
        import select

        assert select.select([pidfd], [], [], 30)[0], "QEMU outlived its owner"
        os.close(pidfd)
    # The id is free again at once: the next to claim it sweeps what was left.
    SmolVM(micro_config).delete()
    assert not (state_dir / "vms" / micro_config.vm_id).exists()


@pytest.fixture
def own_image(micro: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the image that a test may change, without its manifest."""
    rootfs = tmp_path / "own.ext4"
    shutil.copy(micro[1], rootfs)
    return micro[0], rootfs


def test_a_kept_disk_is_refused_over_an_image_that_has_changed(
    micro_config: VMConfig, own_image: tuple[Path, Path], state_dir: Path
) -> None:
    _, rootfs = own_image
    config = changed(micro_config, vm_id="kept-vm", rootfs_path=rootfs, retain_disk_on_delete=True)
    with SmolVM(config) as vm:
        vm.write_text("/root/precious", "data")
    original = rootfs.read_bytes()
    with rootfs.open("r+b") as file:
        file.seek(64 << 20)
        file.write(b"changed")
    with pytest.raises(ImageError, match="made over another version") as caught:
        SmolVM(config).start()
    assert "rm -r" in str(caught.value)
    with pytest.raises(ImageError), SmolVM(changed(config, retain_disk_on_delete=False)):
        pass
    assert (state_dir / "vms/kept-vm/disk.qcow2").exists(), "a refused disk must not be lost"

    rootfs.write_bytes(original)
    with SmolVM.from_id("kept-vm") as vm:
        assert vm.read_text("/root/precious") == "data"
    with pytest.raises(SmolVMError, match="has a kept disk"):
        SmolVM(changed(config, disk_mode="shared")).start()
    assert (state_dir / "vms/kept-vm/disk.qcow2").exists()
    with SmolVM(changed(config, retain_disk_on_delete=False)) as vm:
        assert vm.read_text("/root/precious") == "data"
    assert not (state_dir / "vms/kept-vm").exists()


def test_a_disk_to_be_kept_survives_its_owners_violent_end(
    micro_config: VMConfig, state_dir: Path
) -> None:
    config = changed(micro_config, vm_id="survivor", retain_disk_on_delete=True)
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pytest_smolvm import SmolVM, VMConfig
        vm = SmolVM(VMConfig.model_validate_json(sys.argv[1])).start()
        vm.run("echo data > /root/precious; sync", check=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    subprocess.run(
        [sys.executable, "-c", script, config.model_dump_json()], check=False, timeout=120
    )
    with SmolVM(changed(config, retain_disk_on_delete=False)) as vm:
        assert vm.read_text("/root/precious") == "data\n"
    assert not (state_dir / "vms/survivor").exists()


def test_what_was_written_before_delete_is_on_the_kept_disk(
    micro_config: VMConfig, state_dir: Path
) -> None:
    config = changed(micro_config, vm_id="unsynced", retain_disk_on_delete=True)
    with SmolVM(config) as vm:
        vm.run("head -c 3000000 /dev/urandom > /root/data; sha256sum /root/data", check=True)
        digest = vm.run("sha256sum /root/data").output
    with SmolVM(changed(config, retain_disk_on_delete=False)) as vm:
        assert vm.run("sha256sum /root/data").output == digest


def test_an_image_without_a_manifest_tells_its_own_host_key(
    micro_config: VMConfig, own_image: tuple[Path, Path]
) -> None:
    with SmolVM(changed(micro_config, rootfs_path=own_image[1])) as vm:
        assert vm.run("echo known").output == "known"


def test_a_host_key_that_is_not_the_images_is_refused(
    micro_config: VMConfig, own_image: tuple[Path, Path]
) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from pytest_smolvm.keys import public_openssh

    rootfs = own_image[1]
    other = public_openssh(Ed25519PrivateKey.generate())
    rootfs.with_name(f"{rootfs.name}.smolvm.json").write_text(json.dumps({"host_key": other}))
    with pytest.raises(CommandExecutionUnavailableError, match="not the image's"):
        SmolVM(changed(micro_config, rootfs_path=rootfs)).start()


def test_a_key_that_the_guest_does_not_know_is_refused(
    micro_config: VMConfig, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from pytest_smolvm.keys import private_openssh

    key = tmp_path / "other-key"
    key.write_bytes(private_openssh(Ed25519PrivateKey.generate()))
    with pytest.raises(CommandExecutionUnavailableError, match="refuses to let 'root' in"):
        SmolVM(micro_config, ssh_key_path=key).start()
    key.write_text("no key")
    with pytest.raises(SmolVMError, match="is not a private SSH key"):
        SmolVM(micro_config, ssh_key_path=key).start()


def test_a_vm_without_ssh_boots_and_says_why_it_takes_no_commands(
    micro_config: VMConfig,
) -> None:
    config = changed(micro_config, boot_args="console=ttyS0 reboot=k panic=1 pci=off")
    with SmolVM(config).start() as vm:
        assert vm.status is VMState.RUNNING
        for action in (lambda: vm.run("true"), vm.wait_for_ssh, vm.ssh_commands):
            with pytest.raises(CommandExecutionUnavailableError) as caught:
                action()
            assert "init=/init" in caught.value.reason
            assert "SSH_BOOT_ARGS" in caught.value.remediation
    with pytest.raises(CommandExecutionUnavailableError):
        SmolVM(changed(config, env_vars={"A": "1"})).start()


def test_firecracker_is_refused_before_anything_starts(
    micro_config: VMConfig, state_dir: Path
) -> None:
    others = qemu_pids()
    vm = SmolVM(micro_config, backend="firecracker")
    with pytest.raises(BackendError, match="'firecracker' cannot be used here"):
        vm.start()
    assert vm.status is VMState.ERROR
    assert qemu_pids() == others
    assert not (state_dir / "vms" / vm.vm_id).exists()
