"""python -m tests.faults.soak --vms 2000: one run of so many VMs, and whether it takes ever more.

After each test the run notes its processes, descriptors, threads, memory and disk. None of them may
be more at the end than at the beginning, but for the memory that pytest itself keeps of every test,
which is measured beside it in a run without VMs. Exit status 1 if anything grew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import with_shared_caches

_RUN_TIMEOUT_S = 6 * 3600

TESTS = """
import os, signal, pytest

from pytest_smolvm.records import read_record

VMS = int(os.environ["SOAK_VMS"])


def machine_of(vm):
    return read_record(vm.directory).machine_pid


@pytest.mark.parametrize("number", range(VMS))
def test_vm(smolvm, number, tmp_path):
    assert smolvm.run("echo here").output == "here"
    if number % 5 == 0:
        smolvm.write_text("/root/file", "x" * 10_000)
        smolvm.get("/root/file", tmp_path / "file")
    if number % 10 == 0:
        smolvm.expose_local(80)
        smolvm.pause().resume()
    if number % 25 == 0:
        os.kill(machine_of(smolvm), signal.SIGKILL)
    if number % 40 == 0:
        smolvm.stop().start()
    if number % 50 == 0:
        pytest.fail("its VM is not kept, by policy")
"""

NO_VMS = """
import os, pytest

@pytest.mark.parametrize("number", range(int(os.environ["SOAK_VMS"])))
def test_none(number, tmp_path):
    assert number >= 0
"""

CONFTEST = """
import json, os, pathlib, psutil, pytest

SELF = psutil.Process()
STATE = pathlib.Path(os.environ["SMOLVM_STATE_DIR"])
SAMPLES = open(os.environ["SOAK_SAMPLES"], "a", buffering=1)


def disk_kib():
    total = 0
    for folder, _, names in os.walk(STATE):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks // 2
            except OSError:
                continue
    return total


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish():
    sample = {
        "processes": len(SELF.children(recursive=True)),
        "descriptors": SELF.num_fds(),
        "threads": SELF.num_threads(),
        "memory_kib": SELF.memory_info().rss // 1024,
        "disk_kib": disk_kib(),
        "vm_directories": len(list(STATE.glob("vms/*"))),
    }
    SAMPLES.write(json.dumps(sample) + "\\n")
"""

_FLAT = ("processes", "descriptors", "threads", "vm_directories")
_MAY_GROW_KIB = {"memory_kib": 6.0, "disk_kib": 0.5}
"""Per VM, beyond what pytest keeps of any test: what a run tells of a VM, and of failures."""
_NOISE_KIB = 4096
_LEAST_SAMPLES = 10


@dataclass(frozen=True)
class Growth:
    """A resource at two times."""

    name: str
    first: int
    last: int
    allowed: float

    @property
    def is_flat(self) -> bool:
        return self.last - self.first <= self.allowed


def run(folder: Path, tests: str, vms: int, *options: str) -> list[dict[str, int]]:
    """Run so many tests in one pytest; returns a sample after each."""
    folder.mkdir()
    (folder / "test_soak.py").write_text(tests)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\nsmolvm_mem_size_mib = 128\n")
    samples = folder / "samples"
    environment = {**os.environ, "SOAK_VMS": str(vms), "SOAK_SAMPLES": str(samples)}
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", *options]
    done = subprocess.run(
        argv,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_RUN_TIMEOUT_S,
        check=False,
    )
    taken = [json.loads(line) for line in samples.read_text().splitlines()]
    failed = sum(number % 50 == 0 for number in range(vms)) if "smolvm" in tests else 0
    counts = f"{failed} failed, {vms - failed} passed" if failed else f"{vms} passed"
    if counts not in done.stdout or len(taken) != vms:
        raise SystemExit(f"the run was not as it should be ({counts}):\n{done.stdout[-5000:]}")
    return taken


def growth(taken: Sequence[dict[str, int]], control: Sequence[dict[str, int]]) -> list[Growth]:
    """What each resource was near the beginning, and at the end.

    The least of a tenth of the samples each: the next VM may be there already, or not yet.
    """

    def between(samples: Sequence[dict[str, int]], name: str) -> tuple[int, int]:
        size = max(_LEAST_SAMPLES, len(samples) // 10)
        parts = samples[size // 2 : size // 2 + size], samples[-size:]
        first, last = (min(sample[name] for sample in part) for part in parts)
        return first, last

    found = [Growth(name, *between(taken, name), allowed=0) for name in _FLAT]
    for name, per_vm in _MAY_GROW_KIB.items():
        before, after = between(control, name)
        allowed = max(_NOISE_KIB, per_vm * len(taken)) + max(0, after - before)
        found.append(Growth(name, *between(taken, name), allowed=allowed))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=int, default=2000)
    vms = parser.parse_args().vms
    with tempfile.TemporaryDirectory(prefix="smolvm-soak-") as name:
        state = Path(name) / "state"
        state.mkdir(mode=0o700)
        with_shared_caches(state)
        os.environ["SMOLVM_STATE_DIR"] = str(state)
        control = run(Path(name) / "control", NO_VMS, vms)
        began = time.monotonic()
        taken = run(
            Path(name) / "soak", TESTS, vms, "--smolvm-backend=qemu", "--smolvm-retain=none"
        )
        took_s = time.monotonic() - began
        left = sorted(path.name for path in (state / "vms").iterdir())
    found = growth(taken, control)
    print(f"{'':<16}{'at first':>12}{'at last':>12}{'allowed':>12}")
    for grown in found:
        print(f"{grown.name:<16}{grown.first:>12}{grown.last:>12}{grown.allowed:>+12.0f}")
    print(f"{vms} VMs in {took_s:.0f} s; left at the end: {', '.join(left) or 'nothing'}")
    return 0 if all(grown.is_flat for grown in found) and not left else 1


if __name__ == "__main__":
    sys.exit(main())
