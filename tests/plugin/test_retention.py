"""What each policy keeps, decided when the teardown is known too."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.plugin.conftest import Suite, commands_in, entries
from tests.plugin.runs import interrupt, start

Kept = Callable[[], dict[str, str]]

EVERY_KIND = """
import pytest

@pytest.fixture
def after(smolvm):
    yield
    assert smolvm.run("true").ok  # it is still alive
    raise RuntimeError("torn down wrongly")

@pytest.fixture
def before():
    # Set up before the VM, and so torn down after the fixture that gave it.
    yield
    raise RuntimeError("torn down wrongly")

@pytest.fixture
def broken_setup(smolvm):
    raise RuntimeError("set up wrongly")

def test_pass(smolvm): pass
def test_call(smolvm): assert 0
def test_setup(broken_setup): pass
def test_fixture_after(after): pass
def test_fixture_before(before, smolvm): pass
def test_call_and_teardown(after, smolvm): assert 0
def test_skip(smolvm): pytest.skip("in the test")
@pytest.mark.xfail(strict=False)
def test_xfail(smolvm): assert 0
@pytest.mark.xfail(strict=True)
def test_strict_xpass(smolvm): pass
@pytest.mark.smolvm(boot_args="no-boot init=/init")
def test_no_boot(smolvm): pass
@pytest.mark.smolvm(boot_args="not-even-started init=/init")
def test_not_even_started(smolvm): pass

class TestXunit:
    def teardown_method(self): raise RuntimeError("torn down wrongly")
    def test_xunit_teardown(self, smolvm): pass
"""

INTERRUPTED = """
def test_before(smolvm): pass
def test_interrupted(smolvm): smolvm.run("hang {marker}")
def test_never(smolvm): pass
"""

CRASHED = """
import os
def test_crash(smolvm): os._exit(3)
"""

# What each policy keeps of every kind of test: by its name, why.
FAILED = {
    "test_call": "the test failed",
    "test_setup": "its set-up failed",
    "test_fixture_after": "its teardown failed",
    "test_fixture_before": "its teardown failed",
    "test_call_and_teardown": "the test failed, and its teardown failed",
    "test_strict_xpass": "the test failed",
    "test_no_boot": "it did not boot",
    "test_xunit_teardown": "its teardown failed",
    "test_interrupted": "the run was interrupted in it",
    "test_crash": "its owner, process *, died",
}
DID_NOT_FAIL = dict.fromkeys(
    ["test_pass", "test_skip", "test_xfail", "test_before"], "the policy is to keep all"
)
WHAT_IS_KEPT: dict[str, dict[str, str]] = {
    "all": {**FAILED, **DID_NOT_FAIL},
    "failed": FAILED,
    "none": {},
}


def kept_of(policy: str, source: str) -> dict[str, str]:
    """The part of the table that is about the tests of ``source``."""
    names = re.findall(r"def (test_\w+)", source)
    return {name: why for name, why in WHAT_IS_KEPT[policy].items() if name in names}


@pytest.mark.parametrize("policy", WHAT_IS_KEPT)
def test_each_policy_keeps_what_it_says_of_every_kind_of_failure(
    fake_suite: Suite, kept: Kept, policy: str
) -> None:
    fake_suite(EVERY_KIND, f"--smolvm-retain={policy}")
    assert kept() == kept_of(policy, EVERY_KIND)


def test_the_default_keeps_what_failed(fake_suite: Suite, kept: Kept) -> None:
    fake_suite(EVERY_KIND)
    assert kept() == kept_of("failed", EVERY_KIND)


@pytest.mark.parametrize("policy", WHAT_IS_KEPT)
def test_a_test_that_ctrl_c_ended_did_not_pass(
    fake_suite: Suite, pytester: pytest.Pytester, kept: Kept, policy: str
) -> None:
    marker = pytester.path / "hanging"
    source = INTERRUPTED.format(marker=marker)
    fake_suite(source, "--collect-only")
    output = interrupt(start(f"--smolvm-retain={policy}"), marker.exists)
    assert kept() == kept_of(policy, source)
    if "test_interrupted" in kept():
        assert "the run was interrupted in it" in output
        found = entries_of(kept)
        (entry,) = [e for e in found if e.record.usage.test.endswith("::test_interrupted")]
        assert f"kept: {entry.vm_id}, " in output
        (command,) = commands_in(entry)
        assert command["error"] == "KeyboardInterrupt"


def entries_of(kept: Kept) -> list:  # type: ignore[type-arg]
    del kept
    return entries(Path(os.environ["SMOLVM_STATE_DIR"]))


@pytest.mark.parametrize("policy", WHAT_IS_KEPT)
def test_what_a_crashed_worker_left_is_kept_by_its_controller(
    fake_suite: Suite, kept: Kept, policy: str
) -> None:
    options = [f"--smolvm-retain={policy}", "-n1", "--max-worker-restart=0"]
    result = fake_suite(CRASHED, *options)
    result.stdout.fnmatch_lines(["*worker 'gw0' crashed while running*test_crash*"])
    found = {name: re.sub(r"\d+", "*", why) for name, why in kept().items()}
    assert found == kept_of(policy, CRASHED)
    left = entries_of(kept)
    assert len(left) == len(found)
    for entry in left:
        assert entry.record.machine_pid is None
        result.stdout.fnmatch_lines([f"kept: {entry.vm_id}, *test_crash: its owner, * died"])


def test_a_disk_that_the_configuration_keeps_stays_whatever_the_policy(
    fake_suite: Suite, own_state: Path, pytester: pytest.Pytester
) -> None:
    result = fake_suite(
        """
        import pytest
        @pytest.mark.smolvm(vm_id="precious", retain_disk_on_delete=True)
        def test_one(smolvm): pass
        """,
        "--smolvm-retain=none",
        ini="smolvm_retention_count = 0",
    )
    result.assert_outcomes(passed=1)
    assert (own_state / "vms" / "precious" / "disk.qcow2").exists()
    result.stdout.fnmatch_lines(["kept: precious, *::test_one: retain_disk_on_delete=True"])
    # And a later run that clears out leaves it alone.
    fake_suite("def test_two(smolvm): assert 0", ini="smolvm_retention_max_mib = 0")
    assert (own_state / "vms" / "precious" / "disk.qcow2").exists()


def test_the_marker_decides_for_its_test(fake_suite: Suite, kept: Kept) -> None:
    fake_suite(
        """
        import pytest
        @pytest.mark.smolvm(retain="all")
        def test_all(smolvm): pass
        @pytest.mark.smolvm(retain="none")
        def test_none(smolvm): assert 0
        """
    )
    assert kept() == {"test_all": "the policy is to keep all"}


def test_a_shared_vm_is_kept_if_any_test_that_had_it_failed(fake_suite: Suite, kept: Kept) -> None:
    fake_suite(
        """
        import pytest
        pytestmark = pytest.mark.smolvm(scope="module")
        def test_one(smolvm): smolvm.run("echo one")
        def test_two(smolvm): assert 0
        def test_three(smolvm): smolvm.run("echo three")
        """
    )
    assert kept() == {"test_two": "the test failed"}
    (entry,) = entries_of(kept)
    assert [line["command"] for line in commands_in(entry)] == ["echo one", "echo three"]


def test_the_session_vm_is_kept_if_a_test_that_had_it_failed(fake_suite: Suite, kept: Kept) -> None:
    fake_suite("def test_one(smolvm_session): pass\ndef test_two(smolvm_session): assert 0\n")
    assert kept() == {"test_two": "the test failed"}


def test_the_session_vm_is_kept_if_a_set_up_with_it_was_interrupted(
    fake_suite: Suite, kept: Kept
) -> None:
    fake_suite(
        """
        import pytest
        @pytest.fixture
        def service(smolvm_session): raise KeyboardInterrupt
        def test_one(service): pass
        """
    )
    assert kept() == {"test_one": "the run was interrupted in it"}


def test_what_is_kept_explains_itself(fake_suite: Suite, kept: Kept) -> None:
    fake_suite(
        """
        def test_one(smolvm):
            smolvm.run("echo hello")
            smolvm.run("fail", check=True)
        """
    )
    (entry,) = entries_of(kept)
    assert {path.name for path in entry.path.iterdir()} >= {
        *("vm.json", "disk.qcow2", "console.log", "commands.jsonl", "README.txt")
    }
    readme = (entry.path / "README.txt").read_text()
    assert "test_what_is_kept_explains_itself.py::test_one" in readme
    assert f"ssh {entry.vm_id}" in readme
    config = json.loads((entry.path / "vm.json").read_text())["config"]
    assert config["mem_size_mib"] == 512
    assert [(line["command"], line["exit_code"]) for line in commands_in(entry)] == [
        ("echo hello", 0),
        ("fail", 1),
    ]


def test_only_the_last_sessions_are_kept(fake_suite: Suite, kept: Kept) -> None:
    for number in range(4):
        source = f"def test_{number}_a(smolvm): assert 0\ndef test_{number}_b(smolvm): assert 0\n"
        fake_suite(source, ini="smolvm_retention_count = 2")
    assert set(kept()) == {"test_2_a", "test_2_b", "test_3_a", "test_3_b"}
    # Sessions that keep nothing count for nothing.
    fake_suite("def test_good(smolvm): pass", ini="smolvm_retention_count = 2")
    assert len(kept()) == 4


def test_a_count_of_nought_keeps_nothing(fake_suite: Suite, kept: Kept) -> None:
    result = fake_suite("def test_one(smolvm): assert 0", ini="smolvm_retention_count = 0")
    assert kept() == {}
    result.stdout.no_fnmatch_line("kept:*")


def test_other_projects_are_left_alone(fake_suite: Suite, kept: Kept, own_state: Path) -> None:
    fake_suite("def test_one(smolvm): assert 0")
    (entry,) = entries(own_state)
    record = entry.record
    record.usage = record.usage.model_copy(update={"project": "/another"})
    (entry.path / "vm.json").write_text(record.model_dump_json())
    fake_suite("def test_two(smolvm): assert 0", ini="smolvm_retention_max_mib = 0")
    assert kept() == {"test_one": "the test failed"}


FILL = """
import pytest

@pytest.fixture(autouse=True)
def fill(smolvm):
    # What a guest would have written: the fake's disk is a file as well as a real one's.
    with (smolvm.directory / "disk.qcow2").open("r+b") as disk:
        disk.seek(1 << 20)
        disk.write(b"x" * (2 << 20))
"""


def test_a_byte_budget_holds_even_when_every_test_fails(
    fake_suite: Suite, kept: Kept, own_state: Path
) -> None:
    source = FILL + "\n".join(f"def test_{number}(smolvm): assert 0" for number in range(6))
    result = fake_suite(source, ini="smolvm_retention_max_mib = 7")
    result.assert_outcomes(failed=6)
    found = entries(own_state)
    assert sum(entry.size_bytes for entry in found) <= 7 << 20
    with_disk = {
        entry.record.usage.test.rpartition("::")[2]
        for entry in found
        if (entry.path / "disk.qcow2").exists()
    }
    assert with_disk == {"test_0", "test_1", "test_2"}, "the first failures tell most"
    assert len(found) == 6
    without = next(entry for entry in found if not (entry.path / "disk.qcow2").exists())
    assert "smolvm_retention_max_mib = 7" in (without.path / "README.txt").read_text()
    # A later session takes the place of the earlier one.
    fake_suite(FILL + "def test_later(smolvm): assert 0", ini="smolvm_retention_max_mib = 3")
    assert "test_later" in kept()
    assert sum(entry.size_bytes for entry in entries(own_state)) <= 3 << 20


def test_a_budget_of_nought_keeps_nothing(fake_suite: Suite, kept: Kept) -> None:
    fake_suite("def test_one(smolvm): assert 0", ini="smolvm_retention_max_mib = 0")
    assert kept() == {}


def test_a_vm_that_cannot_be_ended_is_an_error_of_its_test(fake_suite: Suite) -> None:
    result = fake_suite(
        """
        import pytest
        def test_one(smolvm, monkeypatch):
            def refuse(): raise OSError("the disk is gone")
            smolvm._directory.destroy = refuse
        def test_two(smolvm): pass
        """
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*a VM of this test could not be ended: the disk is gone"])


def test_nothing_is_kept_of_vms_that_the_test_deleted(fake_suite: Suite, kept: Kept) -> None:
    fake_suite("def test_one(smolvm):\n    smolvm.delete()\n    assert 0\n")
    assert kept() == {}
