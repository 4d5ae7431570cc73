"""The hooks that others fill in, and the debugger's."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.plugin.conftest import CONFTEST, ROOT, Suite, entries

Count = Callable[[], int]


@pytest.fixture
def hooks(pytester: pytest.Pytester, fake_suite: Suite) -> Callable[[str], None]:
    """Adds hooks to the suite's conftest."""

    def add(source: str) -> None:
        text = CONFTEST.format(root=str(ROOT)) + "\nimport pytest\n" + source
        pytester.path.joinpath("conftest.py").write_text(text)

    return add


def test_the_config_hook_changes_the_vm_of_each_test(
    fake_suite: Suite, hooks: Callable[[str], None]
) -> None:
    hooks(
        """
def pytest_smolvm_config(item, config):
    if "plain" in item.name:
        return None
    assert isinstance(item, (pytest.Item, pytest.Session))
    return config.model_copy(update={"mem_size_mib": 444})
"""
    )
    fake_suite(
        """
        def test_one(smolvm): assert smolvm.config.mem_size_mib == 444
        def test_plain(smolvm): assert smolvm.config.mem_size_mib == 512
        def test_session(smolvm_session): assert smolvm_session.config.mem_size_mib == 444
        """
    ).assert_outcomes(passed=3)


def test_a_config_hook_that_returns_something_else_is_told_so(
    fake_suite: Suite, hooks: Callable[[str], None], boots: Count
) -> None:
    hooks("def pytest_smolvm_config(item, config): return {'mem_size_mib': 1}\n")
    result = fake_suite("def test_one(smolvm): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*hook returned {'mem_size_mib': 1}: return a VMConfig, or None*"])
    assert boots() == 0


def test_the_started_hook_sees_each_vm_once_before_any_test_does(
    fake_suite: Suite, hooks: Callable[[str], None]
) -> None:
    hooks(
        """
def pytest_smolvm_started(item, vm):
    assert vm.status == "running"
    assert vm.commands[-1].command == "echo prepared"
    vm.run(f"echo started {item.name}")
"""
    )
    fake_suite(
        """
        import pytest
        pytestmark = pytest.mark.smolvm(scope="module", prepare=["echo prepared"])
        def test_one(smolvm, smolvm_factory):
            assert smolvm.commands[-1].command == "echo started test_one"
            assert smolvm_factory().commands[-1].command == "echo started test_one"
        def test_two(smolvm):
            assert smolvm.commands[-1].command == "echo started test_one"
        """
    ).assert_outcomes(passed=2)


def test_a_started_hook_that_fails_is_an_error_of_the_test_and_keeps_the_vm(
    fake_suite: Suite, hooks: Callable[[str], None], own_state: Path
) -> None:
    hooks("def pytest_smolvm_started(item, vm): raise RuntimeError('no licence')\n")
    result = fake_suite("def test_one(smolvm): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*no licence*"])
    (entry,) = entries(own_state)
    assert entry.record.retained is not None
    assert entry.record.retained.reason == "it could not be prepared"


FAILS_EVERYWHERE = """
import pytest

@pytest.fixture
def broken_before(smolvm): raise RuntimeError("on purpose")

@pytest.fixture
def broken_after(smolvm):
    yield
    raise RuntimeError("on purpose")

def test_good(smolvm): pass
def test_setup(broken_before): pass
def test_call(smolvm, smolvm_factory):
    smolvm_factory()
    assert 0
def test_teardown(broken_after): pass
def test_without(): assert 0
"""


def test_the_failed_hook_has_the_vm_alive_in_whichever_phase_it_was(
    fake_suite: Suite, hooks: Callable[[str], None], pytester: pytest.Pytester
) -> None:
    hooks(
        """
import pathlib
def pytest_smolvm_failed(item, vm, report):
    assert vm.run("true").ok
    with open("told", "a") as file:
        print(item.name, report.when, file=file)
    report.sections.append(("from the hook", f"found in {item.name}"))
"""
    )
    result = fake_suite(FAILS_EVERYWHERE)
    assert (pytester.path / "told").read_text().splitlines() == [
        "test_setup setup",
        "test_call call",
        "test_call call",
        "test_teardown teardown",
    ]
    result.stdout.fnmatch_lines(["*from the hook*", "found in test_setup"])
    assert "hook failed" not in result.stdout.str()


def test_a_failed_hook_that_fails_is_shown_with_the_failure_and_hides_nothing(
    fake_suite: Suite, hooks: Callable[[str], None]
) -> None:
    hooks("def pytest_smolvm_failed(item, vm, report): raise RuntimeError('cannot look')\n")
    result = fake_suite("def test_one(smolvm): assert 'the real' == 'failure'")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["E *'the real' == 'failure'*", "*a pytest_smolvm_failed hook failed*", "*cannot look*"]
    )


def debug(*commands: str, arguments: tuple[str, ...] = ("--pdb",)) -> str:
    """What pytest prints when these commands are given to its debugger."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        input="".join(f"{command}\n" for command in commands),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    return done.stdout


WAY_IN = r"smolvm: (vm-\w+) is up; to join it from another terminal: (pytest-smolvm .*ssh vm-\w+)"
LIVE = "p 'LIVE', __import__('tests.plugin.fakes').plugin.fakes.live_vms()"


def test_pdb_leaves_the_vm_up_and_says_how_to_join_it(fake_suite: Suite, own_state: Path) -> None:
    fake_suite("def test_one(smolvm):\n    assert 0\ndef test_two(smolvm): pass", "--collect-only")
    text = debug("p smolvm.run('echo from the debugger').output", LIVE, "c")
    found = re.search(WAY_IN, text)
    assert found, text
    assert found[2] == f"pytest-smolvm --state-dir {own_state} ssh {found[1]}"
    assert text.index(found[0]) < text.index("(Pdb)")
    assert "'from the debugger'" in text
    assert f"('LIVE', ['{found[1]}'])" in text
    assert re.search("1 failed, 1 passed", text)
    (entry,) = entries(own_state)
    assert not entry.live


def test_pdb_in_a_teardown_that_failed_has_the_vm_still(fake_suite: Suite, own_state: Path) -> None:
    fake_suite(
        """
        import pytest

        @pytest.fixture
        def before():
            yield
            raise RuntimeError("on purpose")

        def test_one(before, smolvm): pass
        def test_two(smolvm): pass
        """,
        "--collect-only",
    )
    text = debug(LIVE, "c")
    assert re.search(WAY_IN, text), text
    assert re.search(r"\('LIVE', \['vm-\w+'\]\)", text), text
    assert "2 passed, 1 error" in text
    (entry,) = entries(own_state)
    assert not entry.live
    assert entry.record.retained is not None
    assert entry.record.retained.reason == "its teardown failed"


def test_a_vm_that_cannot_be_ended_after_the_debugger_is_told_of(fake_suite: Suite) -> None:
    fake_suite(
        """
        import pytest

        @pytest.fixture
        def before():
            yield
            raise RuntimeError("on purpose")

        @pytest.mark.smolvm(retain="none")
        def test_one(before, smolvm):
            def refuse(): raise OSError("the disk is gone")
            smolvm._directory.destroy = refuse
        """,
        "--collect-only",
    )
    assert "a VM could not be ended: the disk is gone" in debug("c")


def test_a_breakpoint_says_how_to_join_the_vm_and_trace_does_too(fake_suite: Suite) -> None:
    fake_suite("def test_one(smolvm):\n    breakpoint()\n    assert 0\n", "--collect-only")
    assert re.search(WAY_IN, debug("c", arguments=()))
    assert re.search(WAY_IN, debug("c", "c", arguments=("--trace",)))


def test_a_debugger_in_a_test_without_vms_says_nothing_of_them(fake_suite: Suite) -> None:
    fake_suite("def test_one():\n    assert 0\n", "--collect-only")
    assert "smolvm:" not in debug("c")
