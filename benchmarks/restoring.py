"""Figures of restored VMs: how soon one answers, what it takes, what is left when it ends."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.bare import BareGuest, Setting
from benchmarks.table import Seconds, alternate, figure, plain, row
from pytest_smolvm import SmolVM, VMConfig
from pytest_smolvm.store import Store, shared_store
from pytest_smolvm.templates import Template, Templates


def fresh(config: VMConfig, **fields: object) -> VMConfig:
    return VMConfig(**{**config.model_dump(exclude={"vm_id"}), **fields})


def template_of(config: VMConfig) -> Template:
    """The template of the configuration; made if need be."""
    SmolVM(fresh(config)).start().delete()
    templates = Templates(shared_store())
    newest = max(templates.root.glob("[!.]*/template.json"), key=lambda path: path.stat().st_mtime)
    template = templates.find(newest.parent.name)
    assert template is not None
    return template


@contextlib.contextmanager
def bare_setting(config: VMConfig, template: Template | None) -> Iterator[Setting]:
    store = shared_store()
    # Beside the VMs, so that both write to the same file system.
    with tempfile.TemporaryDirectory(dir=store.root) as folder:
        yield Setting(config, store, Path(folder), template)


def first_command(config: VMConfig, template: Template, rounds: int) -> list[str]:
    """Set-up start to first command returned; and what a VM's end takes."""
    ends: list[Seconds] = [[], []]

    def ours() -> float:
        began = time.perf_counter()
        vm = SmolVM(fresh(config)).start()
        assert vm.restored
        vm.run("true")
        took = time.perf_counter() - began
        began = time.perf_counter()
        vm.delete()
        ends[0].append(time.perf_counter() - began)
        return took

    def bare(setting: Setting) -> Callable[[], float]:
        def measure() -> float:
            began = time.perf_counter()
            guest = BareGuest(setting)
            guest.run("true")
            took = time.perf_counter() - began
            began = time.perf_counter()
            guest.end()
            ends[1].append(time.perf_counter() - began)
            return took

        return measure

    with bare_setting(config, template) as setting:
        same = alternate(rounds, ours, bare(setting))
    with bare_setting(config, template) as setting:
        setting.over_tcp = True
        tcp = alternate(max(3, rounds // 2), ours, bare(setting))
    return [
        row("restore to first command returned", "<= 1.15", *same),
        row("  the same, bare script's SSH over TCP", "", *tcp),
        row("end of a VM", "<= 15 ms", *ends),
    ]


def boot_or_restore(config: VMConfig, rounds: int) -> str:
    def start(*, restore: bool) -> Callable[[], float]:
        def measure() -> float:
            began = time.perf_counter()
            with SmolVM(fresh(config), restore=restore) as vm:
                vm.run("true")
                return time.perf_counter() - began

        return measure

    times = alternate(rounds, start(restore=True), start(restore=False))
    return row("  the same, against a cold boot", "<= 0.25", *times)


_SUITE = """
import pytest, time
@pytest.mark.parametrize("n", range({count}))
def test_a(smolvm, n):
    assert smolvm.run("true").ok
    time.sleep({seconds})
"""
_PLUGIN = """
import pytest, time
@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    began = time.perf_counter()
    try:
        return (yield)
    finally:
        if fixturedef.argname == "smolvm":
            with open("waits", "a") as file:
                file.write(f"{time.perf_counter() - began}\\n")
"""


def wait_with_prefetch(count: int) -> str:
    """How long set-ups wait for their VM when tests take longer than a restore."""
    with tempfile.TemporaryDirectory() as folder:
        run_suite(Path(folder), count, 0.6)
        waits = [float(line) for line in Path(folder, "waits").read_text().split()]
    # The first test has nobody before it.
    return plain("wait for a VM, prefetch on", "<= 20 ms", waits[1:])


def run_suite(folder: Path, count: int, seconds: float, *arguments: str) -> float:
    (folder / "test_suite.py").write_text(_SUITE.format(count=count, seconds=seconds))
    (folder / "conftest.py").write_text(_PLUGIN)
    began = time.perf_counter()
    without = [part for name in ("cacheprovider", "asyncio") for part in ("-p", f"no:{name}")]
    argv = [sys.executable, "-m", "pytest", "-q", *without, *arguments]
    subprocess.run(argv, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def throughput(config: VMConfig, template: Template, count: int) -> list[str]:
    """Two workers' rate of trivial tests, against two bare scripts' rate of restores."""

    def bare(*, over_tcp: bool = False) -> float:
        def loop(setting: Setting) -> None:
            for _ in range(count // 2):
                guest = BareGuest(setting)
                guest.run("true")
                guest.end()

        with bare_setting(config, template) as one, bare_setting(config, template) as two:
            one.over_tcp = two.over_tcp = over_tcp
            pids = []
            began = time.perf_counter()
            for setting in (one, two):
                pid = os.fork()
                if pid == 0:
                    loop(setting)
                    os._exit(0)
                pids.append(pid)
            for pid in pids:
                assert os.waitpid(pid, 0)[1] == 0
            return time.perf_counter() - began

    def ours(count: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return run_suite(Path(folder), count, 0, "-n", "2")

    # One run of each is long, and noise only ever adds to it: the better of two.
    rounds = [(ours(count), ours(2), bare(), bare(over_tcp=True)) for _ in range(2)]
    total, begun, bare_s, tcp_s = (min(times) for times in zip(*rounds, strict=True))
    rate = (count - 2) / (total - begun)
    return [
        figure(f"{count} tests, -n 2, VMs per second", rate, ">= 0.9", count / bare_s),
        figure("  the same, bare scripts' SSH over TCP", rate, "", count / tcp_s),
        figure("  the first, pytest's start included", count / total, "", count / bare_s),
    ]


def memory_and_disk(config: VMConfig) -> list[str]:
    """What one of several restored VMs has for itself, idle, before its first command."""
    store = shared_store()
    with contextlib.ExitStack() as stack:
        vms = [stack.enter_context(SmolVM(fresh(config))) for _ in range(3)]
        time.sleep(2)
        taken = [_private_mib(vm) for vm in vms]
        shared = min(each[1] for each in taken)
        own = sorted(each[0] for each in taken)[1]
        disk = max(_disk_kib(store, vm) for vm in vms)
    return [
        figure("memory of its own, idle restored VM, MiB", own, "<= 40"),
        figure("  shared with others, MiB", shared),
        figure("disk before the guest writes, KiB", disk, "<= 1024"),
    ]


def _private_mib(vm: SmolVM) -> tuple[float, float]:
    assert vm._machine is not None
    text = Path(f"/proc/{vm._machine.pid}/smaps_rollup").read_text()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
    private = kib["Private_Clean"] + kib["Private_Dirty"]
    return private / 1024, (kib["Rss"] - private) / 1024


def _disk_kib(store: Store, vm: SmolVM) -> float:
    files = (store.vms / vm.vm_id).iterdir()
    return sum(p.stat().st_blocks for p in files if p.stat().st_nlink == 1) / 2


def growth(config: VMConfig, count: int) -> list[str]:
    """VM number ``count`` against number 5, in one process."""

    def resources() -> list[int]:
        me = Path("/proc/self")
        status = (me / "status").read_text()
        rss = int(re.findall(r"VmRSS:\s+(\d+)", status)[0])
        return [len(list((me / "fd").iterdir())), threading.active_count(), rss >> 10]

    times: Seconds = []
    marks: dict[int, list[int]] = {}
    for number in range(1, count + 1):
        began = time.perf_counter()
        with SmolVM(fresh(config)) as vm:
            vm.run("true")
        times.append(time.perf_counter() - began)
        if number in (5, count):
            marks[number] = resources()
    few = max(1, min(20, count // 3))
    early, late = sorted(times[4 : 4 + few]), sorted(times[-few:])
    lines = [row(f"VMs {count - few}-{count} against 5-{4 + few}", "no growth", late, early)]
    for name, after, before in zip(
        ("open files", "threads", "memory, MiB"), marks[count], marks[5], strict=True
    ):
        lines.append(figure(f"  {name}", after, "no growth", before))
    return lines
