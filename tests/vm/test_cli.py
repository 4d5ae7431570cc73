"""The command ``pytest-smolvm``, on real guests and on what was kept of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from pytest_smolvm import SmolVM, VMConfig
from pytest_smolvm.cli import main
from pytest_smolvm.records import Usage
from pytest_smolvm.store import shared_store
from tests.conftest import cli


@pytest.fixture
def kept(micro_config: VMConfig, no_vms: Path) -> str:
    vm = SmolVM(micro_config).start()
    vm.usage = Usage(test="tests/test_a.py::test_one")
    vm.run("echo canary > /root/canary")
    vm.run("printf 'red \\033[31mwords\\n' > /dev/console")
    vm.retain("the test failed")
    return vm.vm_id


def test_a_kept_vm_is_entered_changed_looked_at_and_removed(kept: str) -> None:
    (listed,) = json.loads(cli("ps", "--json").stdout)
    assert listed["vm_id"] == kept
    assert listed["state"] == "kept"
    assert listed["test"] == "tests/test_a.py::test_one"
    assert listed["kept_because"] == "the test failed"
    assert listed["owner_pid"] is None
    assert listed["size_bytes"] > 0

    assert cli("ssh", kept, "cat", "/root/canary").stdout == "canary\n"
    assert cli("ssh", kept, "echo changed > /root/canary; exit 3", expected=3)
    assert cli("ssh", kept, "cat", "/root/canary").stdout == "changed\n"
    (listed,) = json.loads(cli("ps", "--json").stdout)
    assert listed["kept_because"] == "the test failed"

    assert "changed" not in cli("logs", kept).stdout
    assert "Linux version" in cli("logs", kept).stdout
    first, *_ = cli("logs", "--commands", kept).stdout.splitlines()
    assert json.loads(first)["command"] == "echo canary > /root/canary"

    # It may remove other things: templates that runs of before left over the budget.
    assert kept not in cli("gc").stdout
    assert cli("ssh", kept, "cat", "/root/canary").stdout == "changed\n"
    cli("rm", kept)
    assert "There are no VMs." in cli("ps").stdout
    assert f"there is no VM called '{kept}'" in cli("rm", kept, expected=1).stderr


def test_a_live_vm_of_another_process_is_joined_and_cannot_be_removed(guest: SmolVM) -> None:
    assert cli("ssh", guest.vm_id, "hostname").stdout.strip() == guest.run("hostname").output
    found = {entry["vm_id"]: entry for entry in json.loads(cli("ps", "--json").stdout)}
    listed = found[guest.vm_id]
    assert (listed["state"], listed["live"], listed["owner_pid"]) == ("running", True, os.getpid())
    head, *rows = (line.split() for line in cli("ps").stdout.splitlines())
    assert head == ["VM", "STATE", "AGE", "SIZE", "OWNER", "TEST"]
    assert [guest.vm_id, "running"] in [row[:2] for row in rows]
    assert "in use by process" in cli("rm", guest.vm_id, expected=1).stderr
    cli("gc", "--kept")
    assert guest.run("true").ok


def test_the_log_cannot_drive_a_terminal(kept: str) -> None:
    text = cli("logs", kept).stdout
    assert "red words" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["bogus"], 2, "No such command"),
        (["rm"], 2, "Missing argument"),
        (["logs", "--commands", "--machine", "x"], 2, "not both"),
        (["ssh", "nope"], 1, "there is no VM called 'nope' on this host: there are none"),
        (["logs", "../vms"], 1, "there is no VM called"),
        (["--state-dir", "/proc/nope", "ps"], 1, "cannot be made"),
        (["--help"], 0, "Look after the virtual machines"),
        (["--version"], 0, "version"),
    ],
)
def test_what_was_called_wrongly_is_told_apart_from_what_failed(
    own_state: Path, arguments: list[str], status: int, said: str
) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == status, result.output
    assert said in result.output


def test_a_vm_whose_disk_was_dropped_says_so(own_state: Path, kept_without_disk: str) -> None:
    result = CliRunner().invoke(main, ["ssh", kept_without_disk])
    assert result.exit_code == 1
    assert "was kept without its disk: the budget was spent" in result.output
    assert Path(own_state, "vms", kept_without_disk, "README.txt").exists()


@pytest.fixture
def kept_without_disk(own_state: Path, micro: tuple[Path, Path]) -> str:
    vm = SmolVM(VMConfig(kernel_path=micro[0], rootfs_path=micro[1]))
    vm.retain("a test")
    shared_store().drop_disk(vm.vm_id, "the budget was spent")
    return vm.vm_id
