"""network="nat" on QEMU: what is left of it, and what it says where it cannot be had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytest_smolvm import BackendError, SmolVM, VMConfig
from pytest_smolvm.backends import nat
from pytest_smolvm.process import ToolError
from pytest_smolvm.store import Store
from tests.conftest import changed
from tests.contract.test_nat import slirps

OWNER = """
import sys
from pytest_smolvm import SmolVM, VMConfig
vm = SmolVM(VMConfig.model_validate_json(sys.argv[1])).start()
print(vm.directory, vm._machine.pid, flush=True)
input()
"""


def test_nothing_outlives_a_killed_owner(micro_config: VMConfig) -> None:
    config = changed(micro_config, vm_id="nat-orphan", network="nat")
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, config.model_dump_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with owner:
        assert owner.stdout is not None
        directory, pid = owner.stdout.readline().split()
        assert len(slirps(Path(directory))) == 1
        assert "qemu" in Path("/proc", pid, "comm").read_text()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    end = time.monotonic() + 5
    while (slirps(Path(directory)) or Path("/proc", pid).exists()) and time.monotonic() < end:
        time.sleep(0.01)
    assert slirps(Path(directory)) == []
    assert not Path("/proc", pid).exists()
    assert "nat-orphan" in Store().sweep()


def test_without_slirp4netns_the_line_that_installs_it_is_said(
    micro_config: VMConfig, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str, package: str) -> str:
        raise ToolError(f"{name!r} is not installed; on Debian: apt-get install {package}")

    monkeypatch.setattr(nat, "find_tool", find)
    vm = SmolVM(changed(micro_config, network="nat"))
    with pytest.raises(BackendError, match=r"nat' cannot be had: .*apt-get install slirp4netns"):
        vm.start()
    assert not (state_dir / "vms" / vm.vm_id).exists()


def test_an_address_on_two_interfaces_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = [{"local": "192.0.2.7"}], [{"local": "127.0.0.1"}], [{"local": "192.0.2.7"}], []
    links = json.dumps([{"addr_info": each} for each in addresses])
    monkeypatch.setattr(nat, "run_tool", lambda *_, **__: links)
    assert nat._addresses_of_host() == ["192.0.2.7"]


def test_where_namespaces_cannot_be_made_it_is_said(
    micro_config: VMConfig, state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = tmp_path / "unshare"
    refusing.write_text("#!/bin/sh\necho 'unshare failed: Operation not permitted' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    vm = SmolVM(changed(micro_config, network="nat"))
    with pytest.raises(BackendError, match=r"cannot be made here: unshare failed.*sysctl kernel"):
        vm.start()
    assert not (state_dir / "vms" / vm.vm_id).exists()
