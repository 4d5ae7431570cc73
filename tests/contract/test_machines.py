"""What a user may expect of a VM, whatever backend it is on."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from pytest_smolvm import (
    BackendError,
    OperationTimeoutError,
    SmolVM,
    SmolVMError,
    VMConfig,
    VMNotFoundError,
)
from pytest_smolvm.backends.base import Backend
from pytest_smolvm.images.guestfiles import COMPANION
from pytest_smolvm.images.manifest import read_manifest, write_manifest
from pytest_smolvm.store import shared_store
from tests.conftest import changed
from tests.contract.conftest import REAL, processes_in, wait_until_gone, write_standin


def test_a_guest_boots_and_is_talked_to(shared: SmolVM, backend: Backend) -> None:
    assert shared.backend_name == backend.name
    assert shared.run("hostname").output == shared.vm_id
    assert shared.run("exit 3").exit_code == 3
    assert shared.run("cat", input="over there").output == "over there"
    assert "smolvm" in shared.run("cat /etc/os-release").stdout
    assert "Linux version" in shared.console


def test_files_come_and_go(shared: SmolVM, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "there").write_bytes(data)
    shared.put(tmp_path / "there", "/root/there")
    shared.get("/root/there", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data


def test_a_paused_guest_stands_still_and_goes_on(shared: SmolVM) -> None:
    ticks = "cut -d. -f1 /proc/uptime"
    shared.pause()
    try:
        assert shared.status == "paused"
        with pytest.raises(SmolVMError, match="paused"):
            shared.run("true")
    finally:
        shared.resume()
    assert int(shared.run(ticks).output) > 0


def test_ports_of_the_guest_are_opened_and_closed(shared: SmolVM) -> None:
    shared.run("echo from inside > /tmp/said; nc -l -p 4711 < /tmp/said > /tmp/heard 2>&1 &")
    shared.wait_for_port(4711, timeout=20)
    port = shared.expose_local(4711)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"from outside")
        connection.shutdown(socket.SHUT_WR)
        heard = b""
        while data := connection.recv(1024):
            heard += data
    assert heard == b"from inside\n"
    assert shared.run("cat /tmp/heard").output == "from outside"
    shared.unexpose_local(port)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=10)
    with pytest.raises(SmolVMError, match=str(port)):
        shared.unexpose_local(port)


def test_a_port_in_use_is_an_error_that_names_it(shared: SmolVM) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SmolVMError, match=f"port {port}"):
            shared.expose_local(22, host_port=port)


def test_the_guest_has_no_way_out(shared: SmolVM) -> None:
    with socket.create_server(("0.0.0.0", 0)) as ours:
        port = ours.getsockname()[1]
        for address in ("10.0.2.2", "10.0.2.3", "192.0.2.2", "127.0.0.1"):
            assert not shared.run(f"nc -w 2 {address} {port} < /dev/null", timeout=30).ok
        ours.settimeout(0)
        with pytest.raises(BlockingIOError):
            ours.accept()


def test_each_has_a_disk_of_its_own_and_the_image_stays(shared: SmolVM, config: VMConfig) -> None:
    before = hashlib.sha256(config.rootfs_path.read_bytes()).digest()
    shared.run("echo mine > /root/mine && sync").check()
    with SmolVM(config) as other:
        assert not other.run("cat /root/mine").ok
        assert other.restored
    assert hashlib.sha256(config.rootfs_path.read_bytes()).digest() == before


def test_a_restored_guest_is_a_machine_of_its_own(shared: SmolVM, config: VMConfig) -> None:
    facts = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | xxd -p"
    with SmolVM(changed(config, env_vars={"ONLY": "here"})) as other:
        assert other.restored
        assert other.run("echo $ONLY").output == "here"
        assert other.run("hostname").output == other.vm_id
        ours, theirs = (set(guest.run(facts).stdout.split()) for guest in (shared, other))
        assert len(ours) == len(theirs) == 3
        assert not ours & theirs
        assert abs(float(other.run("date +%s").output) - time.time()) < 5


def test_a_snapshot_is_where_others_start_and_where_one_goes_back_to(config: VMConfig) -> None:
    with SmolVM(config) as vm:
        vm.run("echo then > /root/state; echo then > /dev/shm/state").check()
        template = vm.snapshot()
        vm.run("echo now > /root/state; echo now > /dev/shm/state").check()
        with SmolVM.from_template(template) as other:
            assert other.run("cat /root/state /dev/shm/state").stdout == "then\nthen\n"
            assert other.run("hostname").output == other.vm_id
        assert vm.run("cat /root/state /dev/shm/state").stdout == "now\nnow\n"
        vm.restore(template)
        assert vm.run("cat /root/state /dev/shm/state").stdout == "then\nthen\n"
        template.delete()


def test_a_reboot_keeps_the_disk(config: VMConfig) -> None:
    with SmolVM(config) as vm:
        vm.run("echo stays > /root/stays; echo goes > /dev/shm/goes; sync").check()
        port = vm.expose_local(22)
        boot = vm.run("cat /proc/sys/kernel/random/boot_id").output
        vm.reboot()
        assert vm.run("cat /root/stays").output == "stays"
        assert not vm.run("cat /dev/shm/goes").ok
        assert vm.run("cat /proc/sys/kernel/random/boot_id").output != boot
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            assert connection.recv(4) == b"SSH-"
        vm.reboot(force=True)
        assert vm.run("cat /root/stays").output == "stays"


def test_a_stopped_one_starts_again_on_its_disk(config: VMConfig) -> None:
    with SmolVM(config) as vm:
        vm.run("echo stays > /root/stays").check()
        vm.stop()
        assert vm.status == "stopped"
        wait_until_gone(vm.directory)
        vm.start()
        assert vm.run("cat /root/stays").output == "stays"


def test_one_that_ignores_the_power_button_is_ended(config: VMConfig) -> None:
    with SmolVM(config) as vm:
        for name in ("poweroff", "reboot"):
            vm.write_text(f"{COMPANION}/bin/{name}", "#!/bin/sh\n")
        vm.run(f"chmod +x {COMPANION}/bin/*").check()
        vm.stop(timeout=2)
        assert vm.status == "stopped"
        wait_until_gone(vm.directory)


def test_a_kept_disk_is_opened_again(config: VMConfig) -> None:
    name = f"kept-{uuid.uuid4().hex[:8]}"
    with SmolVM(changed(config, vm_id=name, retain_disk_on_delete=True)) as vm:
        vm.run("echo kept > /root/kept").check()
    again = SmolVM.from_id(name)
    with again:
        assert again.run("cat /root/kept").output == "kept"
    shared_store().remove(name)
    with pytest.raises(VMNotFoundError):
        SmolVM.from_id(name)


def test_a_qcow2_image_boots(config: VMConfig, tmp_path: Path, backend: Backend) -> None:
    image = tmp_path / "image.qcow2"
    convert = ["qemu-img", "convert", "-O", "qcow2", str(config.rootfs_path), str(image)]
    subprocess.run(convert, check=True)
    manifest = read_manifest(config.rootfs_path)
    assert manifest is not None
    write_manifest(image, manifest)
    flat = shared_store().cache / "flat"
    before = set(flat.glob("*.raw"))
    with SmolVM(changed(config, rootfs_path=image), restore=False) as vm:
        vm.run("echo mine > /root/mine && sync").check()
        other = changed(config, rootfs_path=image, vm_id="vm-other", disk_mode="shared")
        with SmolVM(other, restore=False) as shares:
            assert not shares.run("cat /root/mine").ok
    made = set(flat.glob("*.raw")) - before
    assert len(made) == (1 if backend.disk_format == "raw" else 0), "made once, if at all"
    for path in made:
        path.unlink()


def test_a_shared_disk_cannot_be_written(config: VMConfig) -> None:
    with SmolVM(changed(config, disk_mode="shared")) as vm:
        assert "Read-only" in vm.run("echo x > /root/x").stderr
        assert vm.run("echo x > /tmp/x").ok


def test_one_whose_process_is_killed_says_so(config: VMConfig, backend: Backend) -> None:
    with SmolVM(config) as vm:
        assert vm._machine is not None
        os.kill(vm._machine.pid, signal.SIGKILL)
        with pytest.raises(BackendError, match=f"(?i){backend.name} was killed by signal 9"):
            vm.run("true", timeout=20)


def test_a_guest_that_panics_is_told_with_its_console(config: VMConfig) -> None:
    vm = SmolVM(changed(config, boot_args=f"{config.boot_args} root=/dev/nothing"))
    with pytest.raises(BackendError) as caught:
        vm.start()
    assert "cannot be mounted" in str(caught.value)
    with pytest.raises(VMNotFoundError):
        SmolVM.from_id(vm.vm_id)


def test_one_that_does_not_answer_in_time_is_an_error_and_gone(config: VMConfig) -> None:
    vm = SmolVM(config, restore=False)
    with pytest.raises(OperationTimeoutError, match="SSH server"):
        vm.start(boot_timeout=1.5)
    assert not (shared_store().vms / vm.vm_id).exists()


_OWNER = """
import sys, time
from pytest_smolvm import SmolVM, VMConfig, vm
if {binary!r}:
    from pytest_smolvm.backends.firecracker import FirecrackerBackend
    backend = FirecrackerBackend({binary!r}, "x86_64")
    vm.choose = lambda *_, **__: backend
machine = SmolVM(VMConfig.model_validate_json({config!r}), vm_id={name!r}).start()
print("up", flush=True)
time.sleep(600)
"""


def test_nothing_outlives_its_owner(config: VMConfig, backend: Backend, tmp_path: Path) -> None:
    name = f"owned-{uuid.uuid4().hex[:8]}"
    binary = ""
    if backend.name == "firecracker":
        binary = REAL or str(write_standin(tmp_path / "firecracker"))
    script = _OWNER.format(binary=binary, config=config.model_dump_json(), name=name)
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        directory = shared_store().vms / name
        assert processes_in(directory)
    finally:
        owner.kill()
        owner.communicate()
    wait_until_gone(directory)
    shared_store().sweep()
    assert not directory.exists()
