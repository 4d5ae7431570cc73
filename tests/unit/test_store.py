"""The state directory: one owner per VM, and nothing left of dead ones."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytest_smolvm import SmolVMError, VMAlreadyExistsError, VMNotFoundError
from pytest_smolvm.identity import ProcessIdentity
from pytest_smolvm.records import Retained, Usage, new_record, read_record
from pytest_smolvm.statedir import (
    default_state_dir,
    locked,
    make_private_dir,
    read_json,
    write_atomically,
)
from pytest_smolvm.store import Store, shared_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


def test_the_state_directory_is_the_environments_or_the_platforms(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SMOLVM_STATE_DIR", str(tmp_path))
    assert default_state_dir() == tmp_path
    monkeypatch.delenv("SMOLVM_STATE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert default_state_dir() == tmp_path / "xdg" / "pytest-smolvm"


def test_directories_are_private(store: Store) -> None:
    directory = store.claim("vm-1")
    for path in (store.root, store.vms, directory.path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_missing_parents_are_private_too(tmp_path: Path) -> None:
    assert make_private_dir(tmp_path / "a/b").is_dir()
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(SmolVMError, match=r"cannot be made: .*SMOLVM_STATE_DIR"):
        make_private_dir(tmp_path / "file/b")


def test_an_id_has_one_owner_at_a_time(store: Store) -> None:
    directory = store.claim("vm-1")
    directory.write_record(new_record("vm-1", {}))
    with pytest.raises(VMAlreadyExistsError, match=rf"'vm-1' is in use by process {os.getpid()}"):
        store.claim("vm-1")
    assert store.is_owned("vm-1")
    directory.destroy()
    assert not store.is_owned("vm-1")
    store.claim("vm-1").destroy()


def test_a_destroyed_directory_is_gone(store: Store) -> None:
    directory = store.claim("vm-1")
    directory.console.write_text("text")
    directory.destroy()
    assert list(store.vms.iterdir()) == []


def test_the_sweep_leaves_what_somebody_owns_or_wants_kept(store: Store) -> None:
    owned = store.claim("owned")
    kept = store.claim("kept")
    kept.disk.write_bytes(b"disk")
    record = new_record("kept", {})
    record.keep_disk = True
    kept.write_record(record)
    kept.release()
    unreadable = store.claim("unreadable")
    unreadable.disk.write_bytes(b"disk")
    (unreadable.path / "vm.json").write_text('{"of": "another release"}')
    unreadable.release()
    left = store.claim("left")
    left.disk.write_bytes(b"disk")
    left.write_record(new_record("left", {}))
    left.release()
    assert store.sweep() == ["left"]
    assert sorted(path.name for path in store.vms.iterdir()) == ["kept", "owned", "unreadable"]
    owned.destroy()


def test_a_new_owner_finds_a_kept_disk_and_nothing_else(store: Store) -> None:
    first = store.claim("vm-1")
    first.disk.write_bytes(b"disk")
    first.write_record(new_record("vm-1", {}))
    first.release()
    assert not store.claim("vm-1").disk.exists()


def test_what_an_owner_killed_with_signal_9_left_is_swept(store: Store) -> None:
    script = (
        "import sys, pathlib\n"
        "from pytest_smolvm.records import new_record\n"
        "from pytest_smolvm.store import Store\n"
        "d = Store(pathlib.Path(sys.argv[1])).claim('vm-1')\n"
        "d.write_record(new_record('vm-1', {})); print('claimed', flush=True); sys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(store.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"claimed\n"
        assert store.sweep() == []
        with pytest.raises(VMAlreadyExistsError, match=f"process {owner.pid}"):
            store.claim("vm-1")
        owner.send_signal(signal.SIGKILL)
        owner.wait(30)
    assert store.sweep() == ["vm-1"]


def test_a_store_is_swept_when_a_process_first_uses_it(tmp_path: Path) -> None:
    first = Store(tmp_path)
    first.claim("vm-1").release()
    assert (first.vms / "vm-1").exists()
    shared_store(tmp_path)
    assert not (first.vms / "vm-1").exists()


def test_a_lock_that_stays_taken_is_an_error_that_names_it(tmp_path: Path) -> None:
    from pytest_smolvm import OperationTimeoutError

    path = tmp_path / "lock"
    with (
        locked(path, operation="first", timeout_s=1),
        pytest.raises(OperationTimeoutError, match=r"second.*within 0.05 s") as caught,
        locked(path, operation="second", timeout_s=0.05),
    ):
        pass
    assert str(path) in str(caught.value)


def test_a_state_directory_that_cannot_be_made_is_an_error_with_a_way_out(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SmolVMError, match="SMOLVM_STATE_DIR"):
        Store(tmp_path / "file" / "state")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(SmolVMError, match="target"):
        write_atomically(target, b"data")
    assert list(tmp_path.iterdir()) == [target]


def test_a_broken_cache_file_is_no_error(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none") is None
    (tmp_path / "broken").write_text('{"half": ')
    assert read_json(tmp_path / "broken") is None


def keep(store: Store, vm_id: str, **usage: object) -> Path:
    directory = store.claim(vm_id)
    directory.disk.write_bytes(b"disk" * 5000)
    record = new_record(vm_id, {"mem_size_mib": 256})
    record.usage = Usage.model_validate(usage)
    record.retained = Retained(reason="a test", at=time.time())
    directory.keep(record)
    return directory.path


def test_what_was_kept_to_be_looked_at_is_never_swept(store: Store) -> None:
    path = keep(store, "vm-1")
    assert store.sweep() == []
    assert "a test" in (path / "README.txt").read_text()


def test_only_what_was_kept_is_removed_on_request(store: Store) -> None:
    path = keep(store, "vm-1")
    store.remove("vm-1")
    assert not path.exists()
    owned = store.claim("vm-2")
    with pytest.raises(VMAlreadyExistsError, match="when that has ended"):
        store.remove("vm-2")
    owned.destroy()
    for wrong in ("vm-3", "", "..", "../vms", "a/b"):
        with pytest.raises(VMNotFoundError, match="there are none"):
            store.remove(wrong)


@pytest.mark.parametrize("name", ["disk.qcow2", "disk.raw"])
def test_a_disk_can_be_dropped_and_the_rest_says_so(store: Store, name: str) -> None:
    path = keep(store, "vm-1")
    (path / "disk.qcow2").rename(path / name)
    reopened = store.claim("vm-1", reopen=True)
    assert reopened.disk == path / name
    reopened.release()
    store.drop_disk("vm-1", "the budget is spent")
    assert not (path / name).exists()
    assert "the budget is spent" in (path / "README.txt").read_text()


def test_a_disk_that_was_asked_for_is_never_dropped(store: Store) -> None:
    path = keep(store, "vm-1")
    record = read_record(path)
    assert record is not None
    record.keep_disk = True
    directory = store.claim("vm-1", reopen=True)
    directory.keep(record)
    store.drop_disk("vm-1", "the budget is spent")
    assert (path / "disk.qcow2").exists()


def test_what_a_dead_owner_left_waits_for_its_heir(store: Store) -> None:
    heir = ProcessIdentity.of(os.getpid())
    assert heir is not None
    usage = Usage(heir_pid=heir.pid, heir_start_ticks=heir.start_ticks, test="test_a")
    for vm_id, left_to in (("vm-1", usage), ("vm-2", Usage())):
        directory = store.claim(vm_id)
        record = new_record(vm_id, {})
        record.usage = left_to
        directory.write_record(record)
        directory.release()
    assert store.sweep() == ["vm-2"]
    stranger = ProcessIdentity(heir.pid, heir.start_ticks + 1)
    assert store.adopt(stranger) == []
    (adopted,) = store.adopt(heir)
    assert adopted.vm_id == "vm-1"
    assert "died" in (store.vms / "vm-1" / "README.txt").read_text()
    assert store.adopt(heir) == []
    assert store.sweep() == []


def test_what_a_dead_owner_left_to_a_dead_heir_is_swept(store: Store) -> None:
    directory = store.claim("vm-1")
    record = new_record("vm-1", {})
    record.usage = Usage(heir_pid=os.getpid(), heir_start_ticks=1)
    directory.write_record(record)
    directory.release()
    assert store.sweep() == ["vm-1"]
