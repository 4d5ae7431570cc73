"""The Firecracker backend against its stand-in: what it asks, and makes of answers and faults."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_smolvm import BackendError, OperationTimeoutError, SmolVM, VMConfig, templates, vm
from pytest_smolvm.backends import firecracker_api as api
from pytest_smolvm.backends import vsock
from pytest_smolvm.backends.base import MachineSpec, MemoryFile
from pytest_smolvm.backends.firecracker import FirecrackerBackend
from pytest_smolvm.disks import Disk, Image
from pytest_smolvm.errors import SmolVMError
from pytest_smolvm.process import Deadline
from pytest_smolvm.store import shared_store
from pytest_smolvm.vmdisk import prepare_disk
from tests.conftest import changed
from tests.contract.conftest import StandIn, wait_until_gone
from tests.contract.standin import rules


@pytest.fixture
def spec(micro_config: VMConfig, tmp_path: Path) -> MachineSpec:
    """A machine with a disk of nothing, in a directory of its own."""
    directory = tmp_path / "vm"
    directory.mkdir(mode=0o700)
    (directory / "disk.raw").write_bytes(bytes(1 << 20))
    return MachineSpec(
        vm_id="vm-1",
        directory=directory,
        kernel=micro_config.kernel_path,
        initrd=micro_config.effective_initrd_path(),
        boot_args=micro_config.boot_args,
        vcpu_count=1,
        mem_size_mib=128,
        disk=Disk(Image(directory / "disk.raw", "raw")),
        network="isolated",
        accelerator="kvm",
        console=directory / "console.log",
        machine_log=directory / "machine.log",
    )


@pytest.fixture
def on_standin(
    standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> FirecrackerBackend:
    """VMs are on a stand-in that records what it is asked."""
    backend = standin(f"--standin-record={tmp_path / 'record'}")
    monkeypatch.setattr(vm, "choose", lambda *_, **__: backend)
    return backend


# -- what it asks ---------------------------------------------------------------


def test_a_whole_life_asks_for_what_the_specification_knows(
    on_standin: FirecrackerBackend,
    micro_config: VMConfig,
    no_templates: Path,
    record: Callable[[], list[dict[str, Any]]],
) -> None:
    with SmolVM(micro_config) as first:
        first.pause()
        first.resume()
        assert first._machine is not None
        first._machine.press_power_button()
        assert first._machine.wait(60) is not None
    with SmolVM(changed(micro_config, vm_id="vm-second", network="isolated")) as second:
        assert second.restored
    asked = record()
    for request in asked:
        if request["method"] == "GET":
            assert request["path"] in ("/", "/version")
            continue
        body = json.loads(request["body"])
        key = "/drives/" if request["path"].startswith("/drives/") else request["path"]
        rules.check(rules.SCHEMAS[key], body)
    paths = [(request["method"], request["path"]) for request in asked]
    boot = [
        ("GET", "/version"),
        ("PUT", "/machine-config"),
        ("PUT", "/boot-source"),
        ("PUT", "/drives/root"),
        ("PUT", "/entropy"),
        ("PUT", "/vsock"),
        ("PUT", "/actions"),
    ]
    save = [("PATCH", "/vm"), ("PUT", "/snapshot/create"), ("PATCH", "/vm"), ("PATCH", "/vm")]
    worked = [("PATCH", "/vm"), ("PATCH", "/vm"), ("PUT", "/actions")]
    load = [("GET", "/version"), ("PUT", "/snapshot/load"), ("PATCH", "/vm")]
    assert paths == [*boot, *save, *worked, *load]
    bodies = {
        path: json.loads(each["body"])
        for (_, path), each in zip(paths, asked, strict=True)
        if each["body"]
    }
    assert bodies["/drives/root"]["path_on_host"] == "disk.raw"
    assert bodies["/vsock"] == {"guest_cid": 3, "uds_path": "v.sock"}
    assert bodies["/snapshot/load"]["clock_realtime"] is True
    assert bodies["/snapshot/load"]["mem_backend"]["backend_type"] == "File"
    words = bodies["/boot-source"]["boot_args"].split()
    assert {"console=ttyS0", "reboot=k", "pci=off", "init=/init", "smolvm.vsock"} <= set(words)


def test_a_release_without_a_clock_to_correct_is_not_asked_to(
    standin: StandIn,
    tmp_path: Path,
    spec: MachineSpec,
    record: Callable[[], list[dict[str, Any]]],
) -> None:
    backend = standin("--standin-version=1.12.0", f"--standin-record={tmp_path / 'record'}")
    state = spec.directory / "state"
    state.write_text("{}")
    loading = dataclasses.replace(spec, state=state, memory=MemoryFile(state, shared=False))
    with pytest.raises(BackendError, match="could not load a saved state"):
        backend.launch(loading, Deadline(10))
    assert "clock_realtime" not in json.loads(record()[-1]["body"])


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("1.7.0", "too old"),
        ("0.25.2", "too old"),
        ("2.0.0", "unknown to this library"),
        ("new", "no version"),
    ],
)
def test_other_releases_are_refused(
    standin: StandIn, spec: MachineSpec, version: str, why: str
) -> None:
    backend = standin(f"--standin-version={version}")
    with pytest.raises(BackendError, match=why):
        backend.launch(spec, Deadline(10))
    wait_until_gone(spec.directory)


def test_a_refusal_tells_status_and_reason(standin: StandIn, spec: MachineSpec) -> None:
    spec.disk.image.path.unlink()
    spec.disk.image.path.mkdir()  # which is no file, but can be looked at
    with pytest.raises(BackendError, match=r"PUT /drives/root was refused with status 400") as it:
        standin().launch(spec, Deadline(10))
    assert it.value.details["status"] == 400
    assert "backing file" in it.value.details["fault_message"]
    wait_until_gone(spec.directory)


def test_a_kernel_that_it_cannot_boot_is_told_before_it_starts(
    standin: StandIn, spec: MachineSpec, tmp_path: Path
) -> None:
    image = tmp_path / "bzImage"
    image.write_bytes(bytes(0x202) + b"HdrS")
    with pytest.raises(BackendError, match="uncompressed ELF vmlinux"):
        standin().launch(dataclasses.replace(spec, kernel=image), Deadline(10))
    assert not (spec.directory / "api.sock").exists()


# -- faults -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("at-start", r"ended as it started.*exit status 1: .*a fault that was asked for"),
        ("dies:/version", r"GET /version.*exit status 139"),
        ("dies:/machine-config", r"PUT /machine-config.*exit status 139"),
        ("dies:/actions", r"PUT /actions.*exit status 139"),
        ("garbage:/version", r"GET /version: no answer that can be understood"),
        ("garbage:/vsock", r"PUT /vsock: no answer that can be understood"),
        ("odd:/version", r"GET /version with what its specification does not know"),
        ("huge:/version", r"no answer that can be understood: more than 1 MiB"),
    ],
)
def test_a_fault_at_the_start_is_told_and_leaves_nothing(
    standin: StandIn, spec: MachineSpec, fault: str, said: str
) -> None:
    with pytest.raises(BackendError, match=f"(?s){said}"):
        standin(f"--standin-fault={fault}").launch(spec, Deadline(20))
    wait_until_gone(spec.directory)


@pytest.mark.parametrize("fault", ["silent", "drips"])
@pytest.mark.parametrize("path", ["/version", "/actions"])
def test_one_that_never_answers_is_waited_for_no_longer_than_a_request_may_take(
    standin: StandIn, spec: MachineSpec, monkeypatch: pytest.MonkeyPatch, fault: str, path: str
) -> None:
    if fault == "drips" and path == "/actions":
        path = "/entropy"  # one that starts no guest
    monkeypatch.setattr(api, "REQUEST_TIMEOUT_S", 2.0)
    monkeypatch.setattr(api.Api.put, "__defaults__", (2.0,))
    with pytest.raises(OperationTimeoutError, match=f"{path} was not done within 2 s"):
        standin(f"--standin-fault={fault}:{path}").launch(spec, Deadline(20))
    wait_until_gone(spec.directory)


def test_one_that_never_listens_is_waited_for_until_the_deadline(
    standin: StandIn, spec: MachineSpec
) -> None:
    with pytest.raises(OperationTimeoutError, match="waiting for Firecracker's API"):
        standin("--standin-fault=never-listens").launch(spec, Deadline(0.7))
    wait_until_gone(spec.directory)


def test_a_slow_one_is_waited_for(standin: StandIn, spec: MachineSpec) -> None:
    machine = standin("--standin-fault=slow:/machine-config").launch(spec, Deadline(20))
    try:
        assert machine.poll() is None
    finally:
        machine.kill()
    wait_until_gone(spec.directory)


def test_one_that_dies_later_is_told_by_whoever_looks(standin: StandIn, spec: MachineSpec) -> None:
    machine = standin("--standin-fault=later:/actions").launch(spec, Deadline(20))
    try:
        end = machine.wait(20)
        assert end is not None
        assert (end.exit_status, end.emulator, end.by_guest) == (139, "Firecracker", False)
        with pytest.raises(BackendError, match="no answer that can be understood"):
            machine.pause()
    finally:
        machine.kill()


def test_a_state_that_cannot_be_loaded_is_told_and_the_vm_boots(
    on_standin: FirecrackerBackend, micro_config: VMConfig, no_templates: Path
) -> None:
    with SmolVM(micro_config) as first:
        assert first.templates_made == 1
    (state,) = no_templates.glob("templates/*/state")
    facts = state.parent / "template.json"
    told = json.loads(facts.read_text())
    state.write_text(json.dumps({"version": "0.0.0", "config": {}}))
    # As if it had been made so: the library's own checks of a template are tried elsewhere.
    told["files"]["state"] = templates._measure(state).model_dump()
    facts.write_text(json.dumps(told))
    templates._checked.clear()
    with SmolVM(changed(micro_config, vm_id="vm-again")) as again:
        assert not again.restored
        assert "unsupported version 0.0.0" in again.troubles[0]
        assert again.run("true").ok


# -- vsock -------------------------------------------------------------------------


class _Vsock:
    """A unix socket that answers as Firecracker's does, or as it should not."""

    def __init__(self, path: Path, answer: bytes | None) -> None:
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen()
        self.heard: list[bytes] = []
        self._answer = answer
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._server.accept()
            self._connections.append(connection)
            self.heard.append(connection.recv(64))
            if self._answer is None:
                connection.close()
            else:
                connection.sendall(self._answer)


def test_a_port_on_which_nobody_listens_is_tried_until_the_deadline(tmp_path: Path) -> None:
    server = _Vsock(tmp_path / "v.sock", None)
    with pytest.raises(OperationTimeoutError, match="vsock port 1025"):
        vsock.connect(str(tmp_path / "v.sock"), 1025, Deadline(1.0))
    assert len(server.heard) > 1
    assert set(server.heard) == {b"CONNECT 1025\n"}


def test_what_comes_after_the_acknowledgement_is_the_guests(tmp_path: Path) -> None:
    _Vsock(tmp_path / "v.sock", b"OK 1073741824\nhello")
    with vsock.connect(str(tmp_path / "v.sock"), 1025, Deadline(5)) as connection:
        assert connection.recv(5, socket.MSG_WAITALL) == b"hello"


def test_another_answer_is_an_error_that_quotes_it(tmp_path: Path) -> None:
    _Vsock(tmp_path / "v.sock", b"NO\n")
    with pytest.raises(BackendError, match="NO"):
        vsock.connect(str(tmp_path / "v.sock"), 1025, Deadline(5))


def test_a_forwarded_port_ends_where_nobody_listens_in_the_guest(tmp_path: Path) -> None:
    _Vsock(tmp_path / "v.sock", None)
    forwards = vsock.Forwards(str(tmp_path / "v.sock"))
    port = forwards.open(80, 0)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            assert connection.recv(1) == b""
        with pytest.raises(SmolVMError, match=f"port {port}"):
            forwards.open(81, port)
    finally:
        forwards.close_all()
    assert forwards.guest_ports == {}


def test_a_disk_that_it_kept_is_opened_by_qemu(
    standin: StandIn, micro_config: VMConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(micro_config, vm_id="vm-moves", retain_disk_on_delete=True)
    with monkeypatch.context() as patch:
        backend = standin()
        patch.setattr(vm, "choose", lambda *_, **__: backend)
        with SmolVM(config) as machine:
            machine.run("echo kept > /root/kept").check()
    assert (shared_store().vms / "vm-moves/disk.raw").exists()
    with SmolVM(config, backend="qemu") as again:
        assert again.run("cat /root/kept").output == "kept"
        with pytest.raises(SmolVMError, match="made by another backend, as raw"):
            again.snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(vm, "choose", lambda *_, **__: backend)
        with SmolVM(config) as at_home:
            assert at_home.run("cat /root/kept").output == "kept"
    shared_store().remove("vm-moves")


# -- disks ---------------------------------------------------------------------------


def test_a_disk_takes_no_more_room_than_its_data(
    on_standin: FirecrackerBackend, micro_config: VMConfig, tmp_path: Path
) -> None:
    spacious = tmp_path / "spacious.ext4"
    with spacious.open("wb") as file:
        file.write(os.urandom(60 << 20))
        file.truncate(2 << 30)
    store = shared_store()
    directory = store.claim("vm-spacious")
    try:
        config = changed(micro_config, vm_id="vm-spacious", rootfs_path=spacious)
        disk = prepare_disk(config, directory, [], store, on_standin.disk_format)
        facts = disk.image.path.stat()
        assert facts.st_size == 2 << 30
        assert facts.st_blocks * 512 < 62 << 20
        with disk.image.path.open("rb") as ours, spacious.open("rb") as theirs:
            assert ours.read(60 << 20) == theirs.read(60 << 20)
    finally:
        directory.destroy()
