"""Whether one more VM fits into the host's memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pytest_smolvm.admission import OVERHEAD_MIB, RESERVE_MIB, admitted
from pytest_smolvm.identity import ProcessIdentity
from pytest_smolvm.store import Store

PAGES_PER_MIB = (1 << 20) // os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc" / "1").mkdir(parents=True)
    (tmp_path / "proc" / "1" / "cmdline").write_bytes(b"/sbin/init\0")
    return tmp_path / "proc"


def machine(proc: Path, vm_id: str, mem_mib: int, own_mib: int) -> None:
    """A QEMU with ``mem_mib`` for its guest that has ``own_mib`` of memory of its own now."""
    folder = proc / str(1000 + len(list(proc.iterdir())))
    folder.mkdir()
    argv = ["/usr/bin/qemu-system-x86_64", "-name", f"smolvm-{vm_id}", "-smp", "2", "-m"]
    (folder / "cmdline").write_bytes(
        "\0".join([*argv, f"{mem_mib}M", "-sandbox", "on", ""]).encode()
    )
    shared = 20 * PAGES_PER_MIB
    resident = own_mib * PAGES_PER_MIB + shared
    (folder / "statm").write_text(f"999999 {resident} {shared} 1 0 1 0\n")


def fits(store: Store, proc: Path, available_mib: int | None, mem_mib: int = 512) -> bool:
    with admitted(store, "vm-new", mem_mib, available=lambda: available_mib, proc=proc) as answer:
        return answer


def test_a_vm_fits_where_there_is_room_for_all_of_it_and_a_reserve(
    store: Store, proc: Path
) -> None:
    needed = 512 + OVERHEAD_MIB + RESERVE_MIB
    assert fits(store, proc, needed)
    assert not fits(store, proc, needed - 1)


def test_the_vms_of_all_processes_count_at_the_size_that_they_may_grow_to(
    store: Store, proc: Path
) -> None:
    machine(proc, "vm-a", 1024, own_mib=100)
    machine(proc, "vm-b", 256, own_mib=5000)  # it cannot give back what it has
    needed = 512 + OVERHEAD_MIB + RESERVE_MIB + (1024 + OVERHEAD_MIB - 100)
    assert fits(store, proc, needed)
    assert not fits(store, proc, needed - 1)


def test_what_others_are_about_to_start_counts(store: Store, proc: Path) -> None:
    needed = 512 + OVERHEAD_MIB + RESERVE_MIB
    with admitted(store, "vm-other", 512, available=lambda: 10 * needed, proc=proc):
        both = needed + 512 + OVERHEAD_MIB
        assert fits(store, proc, both)
        assert not fits(store, proc, both - 1)
        # Once its machine runs, it is counted by that alone.
        machine(proc, "vm-other", 512, own_mib=0)
        assert fits(store, proc, both)
    assert not list((store.root / "admissions").glob("*.json"))


def test_what_a_dead_process_spoke_for_is_free_again(store: Store, proc: Path) -> None:
    pending = store.root / "admissions"
    pending.mkdir()
    me = ProcessIdentity.of(os.getpid())
    assert me is not None
    left = {"mib": 100_000, "pid": me.pid, "start_ticks": me.start_ticks - 1}
    (pending / "vm-dead.json").write_text(json.dumps(left))
    assert fits(store, proc, 512 + OVERHEAD_MIB + RESERVE_MIB)
    assert not (pending / "vm-dead.json").exists()


def test_where_nobody_can_tell_the_users_bound_is_the_only_one(store: Store, proc: Path) -> None:
    assert fits(store, proc, None)


def test_a_real_vm_of_this_host_is_seen(store: Store) -> None:
    """The pattern is that of our own command line: see tests/vm for the machine itself."""
    from pytest_smolvm.admission import _MACHINE
    from tests.unit.test_qemu_args import argv

    text = "\0".join([*argv(vm_id="web-1", mem_size_mib=384), ""]).encode()
    found = _MACHINE.search(text)
    assert found is not None
    assert (found[1], found[2]) == (b"web-1", b"384")
