"""The short forms of the two fault injectors; each as it is called by hand."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_smolvm.records import RECORD_NAME, Retained, new_record
from pytest_smolvm.statedir import try_lock
from tests.faults.kills import points
from tests.faults.scene import Findings, Scene
from tests.faults.soak import growth


def inject(*arguments: str) -> str:
    """What a fault injector printed; it must have found nothing."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_one_kill_at_each_point_leaves_nothing() -> None:
    """Where every kill must be over in 2 s, this one may take longer: the machine is shared."""
    kills = str(len(points()))
    told = inject("tests.faults.kills", "--kills", kills, "--grace-s", "30", "--open", "0")
    for point in points():
        assert re.search(rf"^{point.name} +1 +0 +\d+ ms +0 +0 +0 +0$", told, re.MULTILINE), told


def test_a_short_soak_takes_ever_the_same() -> None:
    told = inject("tests.faults.soak", "--vms", "40")
    assert re.search(r"^40 VMs in \d+ s; left at the end: nothing$", told, re.MULTILINE), told


@pytest.mark.parametrize("name", ["processes", "descriptors", "threads", "vm_directories"])
def test_a_soak_sees_what_grows_by_one_in_ten_vms(name: str) -> None:
    samples = [sample(**{name: number // 10}) for number in range(100)]
    assert [grown.name for grown in growth(samples, [sample()] * 100) if not grown.is_flat] == [
        name
    ]


@pytest.mark.parametrize(("name", "per_vm"), [("memory_kib", 60), ("disk_kib", 60)])
def test_a_soak_sees_what_grows_with_each_vm(name: str, per_vm: int) -> None:
    samples = [sample(**{name: number * per_vm}) for number in range(100)]
    assert [grown.name for grown in growth(samples, [sample()] * 100) if not grown.is_flat] == [
        name
    ]
    assert all(grown.is_flat for grown in growth(samples, samples))  # so much is pytest's own


def sample(**values: int) -> dict[str, int]:
    names = ("processes", "descriptors", "threads", "vm_directories", "memory_kib", "disk_kib")
    return {name: 5 + values.get(name, 0) for name in names}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    for name in ("SMOLVM_STATE_DIR", "KEPT_ONE", "SYNCED"):
        monkeypatch.setenv(name, "restored by monkeypatch")  # the scene sets them
    scene = Scene(tmp_path)
    image = scene.state / "images" / "one-0123"
    image.mkdir()
    (image / "rootfs.ext4").write_bytes(b"root")
    digest = hashlib.sha256(b"root").hexdigest()
    (image / "digests.json").write_text(json.dumps({"rootfs.ext4": [4, 0, digest]}))
    directory = scene.store.vms / "vm-1"
    directory.mkdir()
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", directory / "disk.qcow2", "1M"], check=True
    )
    record = new_record("vm-1", {})
    record.retained = Retained(reason="a test failed", at=0)
    (directory / RECORD_NAME).write_text(record.model_dump_json())
    return scene


def found(place: Scene) -> dict[str, int]:
    findings = Findings()
    place.check(findings)
    counts = {name: len(said) for name, said in vars(findings).items()}
    return {name: count for name, count in counts.items() if count}


def test_kills_see_what_is_wrong(place: Scene) -> None:
    assert found(place) == {}
    lock = try_lock(place.state / "images" / "one-0123.lock")
    assert lock is not None
    assert found(place) == {"locked": 1}
    lock.release()
    (place.state / "images" / "one-0123" / "rootfs.ext4").write_bytes(b"rook")
    assert found(place) == {"corrupt": 1}
    (place.state / "images" / "one-0123" / "rootfs.ext4").write_bytes(b"root")
    (place.state / "templates" / "t").mkdir(parents=True)
    assert found(place) == {"corrupt": 1}
    (place.state / "templates" / "t").rmdir()
    place.marker.touch()  # a test failed in this run, and no VM was kept for it
    assert found(place) == {"lost": 1}
    disk = place.store.vms / "vm-1" / "disk.qcow2"
    data = disk.read_bytes()
    disk.write_bytes(data + b"x")
    assert found(place) == {"lost": 1}
    place.store.remove("vm-1")
    assert found(place) == {"lost": 1}
    assert found(place) == {}
    (place.store.vms / "vm-2").mkdir()
    findings = Findings()
    place.check_next(findings)
    assert findings.next_run == ["the next run left vm-2"]
