"""python -m benchmarks: every figure beside the bare minimum, alternating, in one table.

Machines are shared and noisy: only the ratios mean anything, and only within one run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.bare import BareGuest
from pytest_smolvm import SSH_BOOT_ARGS, ImageBuilder, SmolVM, VMConfig
from pytest_smolvm.store import shared_store

Seconds = list[float]


def alternate(rounds: int, ours: Callable[[], float], bare: Callable[[], float]) -> list[Seconds]:
    """Both in turn, each first as often as second."""
    times: list[Seconds] = [[], []]
    for number in range(rounds):
        order = [(0, ours), (1, bare)]
        for index, measure in order if number % 2 else reversed(order):
            times[index].append(measure())
    return times


def row(name: str, bar: str, ours: Seconds, bare: Seconds) -> str:
    def milliseconds(times: Seconds) -> str:
        ordered = sorted(times)
        p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
        return f"{statistics.median(times) * 1e3:9.1f} {p95 * 1e3:9.1f}"

    ratio = statistics.median(ours) / statistics.median(bare)
    return f"{name:34} {milliseconds(ours)} {milliseconds(bare)} {ratio:7.2f}  {bar}"


def cold_boot(config: VMConfig, rounds: int) -> str:
    store = shared_store()

    def ours() -> float:
        vm = SmolVM(config)
        began = time.perf_counter()
        vm.start()
        seconds = time.perf_counter() - began
        vm.delete()
        return seconds

    def bare() -> float:
        with tempfile.TemporaryDirectory() as folder:
            guest = BareGuest(config, store, Path(folder))
            guest.end()
        return guest.seconds

    return row("cold boot to SSH login", "<= 1.15", *alternate(rounds, ours, bare))


def run_true(config: VMConfig, rounds: int) -> str:
    with SmolVM(config) as vm, tempfile.TemporaryDirectory() as folder:
        guest = BareGuest(config, shared_store(), Path(folder))

        def timed(action: Callable[[], object]) -> Callable[[], float]:
            def measure() -> float:
                began = time.perf_counter()
                action()
                return time.perf_counter() - began

            return measure

        ours, bare = timed(lambda: vm.run("true")), timed(lambda: guest.run("true"))
        alternate(10, ours, bare)  # an emulator's first time with any code is slow
        times = alternate(rounds, ours, bare)
        guest.end()
    return row('run("true"), kept connection', "<= 1.2", *times)


_LOAD = "import pytest, time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def plugin_load(rounds: int) -> str:
    def load(module: str) -> Callable[[], float]:
        def measure() -> float:
            script = _LOAD.format(module)
            argv = [sys.executable, "-c", script]
            # As installed: from compiled files, which some environments forbid to write.
            env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
            return float(subprocess.check_output(argv, env=env))

        return measure

    ours, bare = load("pytest_smolvm.plugin"), load("this_module_is_empty")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "this_module_is_empty.py").touch()
        os.environ["PYTHONPATH"] = folder
        load("pytest_smolvm.plugin")()  # compiles it
        times = alternate(rounds, ours, bare)
    return row("loading the plugin (an empty module)", "< 15 ms", *times)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--boots", type=int, default=15, metavar="N", help="rounds of cold boots")
    parser.add_argument("--runs", type=int, default=300, metavar="N", help="rounds of run()")
    parser.add_argument("--loads", type=int, default=30, metavar="N", help="rounds of loading")
    wanted = parser.parse_args()
    kernel, rootfs = ImageBuilder().build_micro_ssh_key()
    config = VMConfig(
        vm_id="benchmark",
        kernel_path=kernel,
        rootfs_path=rootfs,
        boot_args=SSH_BOOT_ARGS,
        vcpu_count=1,
        mem_size_mib=256,
    )
    print(f"{'milliseconds':34} {'median':>9} {'p95':>9} {'bare':>9} {'p95':>9}   ratio  bar")
    print(plugin_load(wanted.loads), flush=True)
    print(run_true(config, wanted.runs), flush=True)
    print(cold_boot(config, wanted.boots), flush=True)


if __name__ == "__main__":
    main()
