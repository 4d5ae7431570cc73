"""Workers on other hosts: state and locks are the host's own, never the controller's paths."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_smolvm.inventory import inventory
from pytest_smolvm.store import Store
from tests.conftest import COMMAND, with_shared_caches
from tests.plugin import hosts

SOURCE = """
import os, platform, pytest
from pathlib import Path

@pytest.mark.parametrize("number", range(4))
@pytest.mark.smolvm(mem_size_mib=256)
def test_one(smolvm, number):
    assert smolvm.run("true").ok
    name = platform.node()
    assert smolvm.state_dir == Path(os.environ["HOST_STATE"]) and name in str(smolvm.state_dir)
    address, port = smolvm._machine.ssh_address
    assert address == "127.0.0.1"
    print(f"RAN ON {name}")
    assert number != 1, "on purpose"
"""


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[hosts.Hosts]:
    if problem := hosts.why_not():
        pytest.skip(problem)
    with hosts.two_hosts(tmp_path) as found:
        for host in found.others:
            with_shared_caches(host.state_dir)
        yield found


def test_workers_on_two_other_hosts_keep_their_vms_there(
    two_hosts: hosts.Hosts, pytester: pytest.Pytester, own_state: Path, micro: tuple[Path, Path]
) -> None:
    del micro  # built, and found by each host in what it takes for its own
    pytester.makepyfile(SOURCE)
    options = [f"--tx={host.tx}" for host in two_hosts.others]
    command = two_hosts.command(
        *(sys.executable, "-m", "pytest", "-rP", "--dist=load", *options),
        *("--rsyncdir", str(pytester.path), f"--smolvm-state-dir={own_state}", str(pytester.path)),
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "1 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    names = [host.name for host in two_hosts.others]
    for name in names:
        assert f"RAN ON {name}" in done.stdout
    counts = re.search(r"VMs: (\d) booted, (\d) restored, 0 reused", done.stdout)
    assert counts is not None
    assert int(counts[1]) + int(counts[2]) == 4

    assert not own_state.exists(), "the controller has no VMs, and so no state"
    kept = {host: inventory(Store(host.state_dir)) for host in two_hosts.others}
    ((host, entry),) = [(host, entry) for host, found in kept.items() for entry in found]
    assert not entry.live
    assert entry.record.usage.test.endswith("::test_one[1]")
    line = f"pytest-smolvm --state-dir {host.state_dir} ssh {entry.vm_id}"
    assert f"on {host.name}: {line}" in done.stdout

    # Back in, on the host that has it.
    entered = subprocess.run(
        two_hosts.command(
            *("ssh", "-F", str(host.ssh_config), host.name, f"{COMMAND.parent}/{line} hostname")
        ),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert entered.stdout == f"{entry.vm_id}\n", entered.stderr
