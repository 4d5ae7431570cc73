"""python -m benchmarks: every figure beside the bare minimum, alternating, in one table.

Machines are shared and noisy: only the ratios mean anything, and only within one run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import images, restoring
from benchmarks.bare import BareGuest
from benchmarks.table import alternate, head, row
from pytest_smolvm import SSH_BOOT_ARGS, ImageBuilder, SmolVM, VMConfig


def cold_boot(config: VMConfig, rounds: int) -> str:
    def ours() -> float:
        vm = SmolVM(config, restore=False)
        began = time.perf_counter()
        vm.start()
        seconds = time.perf_counter() - began
        vm.delete()
        return seconds

    def bare() -> float:
        with restoring.bare_setting(config, None) as setting:
            guest = BareGuest(setting)
            guest.end()
        return guest.seconds

    return row("cold boot to SSH login", "<= 1.15", *alternate(rounds, ours, bare))


def run_true(config: VMConfig, rounds: int) -> str:
    with SmolVM(config) as vm, restoring.bare_setting(config, None) as setting:
        guest = BareGuest(setting)

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
    parser.add_argument("--restores", type=int, default=40, metavar="N", help="rounds of restores")
    parser.add_argument("--tests", type=int, default=100, metavar="N", help="tests, two workers")
    parser.add_argument("--vms", type=int, default=500, metavar="N", help="VMs in one process")
    parser.add_argument("--images", type=int, default=10, metavar="N", help="images built")
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
    print(head())
    print(plugin_load(wanted.loads), flush=True)
    print(run_true(config, wanted.runs), flush=True)
    print(cold_boot(config, wanted.boots), flush=True)
    # What follows is with the defaults: two virtual CPUs, 512 MiB.
    config = VMConfig(kernel_path=kernel, rootfs_path=rootfs, boot_args=SSH_BOOT_ARGS)
    template = restoring.template_of(config)
    figures: list[Callable[[], list[str]]] = [
        lambda: restoring.first_command(config, template, wanted.restores),
        lambda: [restoring.boot_or_restore(config, wanted.boots)],
        lambda: [restoring.wait_with_prefetch(max(5, wanted.restores // 2))],
        lambda: restoring.throughput(config, template, wanted.tests),
        lambda: restoring.memory_and_disk(config),
        lambda: restoring.growth(config, wanted.vms),
        lambda: images.building(wanted.images),
    ]
    for measure in figures:
        print("\n".join(measure()), flush=True)


if __name__ == "__main__":
    main()
