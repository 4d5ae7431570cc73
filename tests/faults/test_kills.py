"""The short forms of the two fault injectors; each as it is called by hand."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.faults.kills import points
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


@pytest.mark.parametrize(("name", "per_vm"), [("memory_kib", 20), ("disk_kib", 20)])
def test_a_soak_sees_what_grows_with_each_vm(name: str, per_vm: int) -> None:
    samples = [sample(**{name: number * per_vm}) for number in range(100)]
    assert [grown.name for grown in growth(samples, [sample()] * 100) if not grown.is_flat] == [
        name
    ]
    assert all(grown.is_flat for grown in growth(samples, samples))  # so much is pytest's own


def sample(**values: int) -> dict[str, int]:
    names = ("processes", "descriptors", "threads", "vm_directories", "memory_kib", "disk_kib")
    return {name: 5 + values.get(name, 0) for name in names}
