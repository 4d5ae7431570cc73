"""Which tests share a VM, and what becomes of one that is no longer fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.plugin.conftest import Suite

Count = Callable[[], int]

NESTED = """
import pytest
seen = {}

class TestOne:
    def test_a(self, smolvm): seen.setdefault("one", set()).add(smolvm.vm_id)
    def test_b(self, smolvm): seen.setdefault("one", set()).add(smolvm.vm_id)

class TestTwo:
    def test_a(self, smolvm): seen.setdefault("two", set()).add(smolvm.vm_id)
    def test_b(self, smolvm): seen.setdefault("two", set()).add(smolvm.vm_id)

def test_alone(smolvm): seen.setdefault("alone", set()).add(smolvm.vm_id)
"""


@pytest.mark.parametrize(
    ("scope", "vms"), [("function", 10), ("class", 6), ("module", 2), ("session", 1)]
)
def test_tests_of_one_node_with_equal_configuration_share_a_vm(
    fake_suite: Suite, boots: Count, pytester: pytest.Pytester, scope: str, vms: int
) -> None:
    pytester.makepyfile(test_first=NESTED, test_second=NESTED)
    fake_suite("", f"--smolvm-scope={scope}").assert_outcomes(passed=10)
    assert boots() == vms


def test_the_scope_is_also_an_ini_option_and_a_marker_argument(
    fake_suite: Suite, boots: Count
) -> None:
    source = NESTED + "\npytestmark = pytest.mark.smolvm(scope='class')\n"
    fake_suite(source, ini="smolvm_scope = session").assert_outcomes(passed=5)
    assert boots() == 3


def test_a_different_configuration_gets_a_vm_of_its_own(fake_suite: Suite, boots: Count) -> None:
    fake_suite(
        """
        import pytest
        pytestmark = pytest.mark.smolvm(scope="module")
        ids = {}

        @pytest.mark.parametrize("again", [1, 2])
        def test_plain(smolvm, again):
            ids.setdefault("plain", set()).add(smolvm.vm_id)

        @pytest.mark.smolvm(env_vars={})
        def test_the_same_in_other_words(smolvm):
            ids["plain"].add(smolvm.vm_id)
            assert len(ids["plain"]) == 1

        @pytest.mark.smolvm(vcpu_count=1)
        def test_other_field(smolvm):
            assert smolvm.vm_id not in ids["plain"]

        @pytest.mark.smolvm(prepare=["true"])
        def test_other_preparation(smolvm):
            assert smolvm.vm_id not in ids["plain"]

        @pytest.mark.smolvm(vm_id="named")
        def test_other_id(smolvm):
            assert smolvm.vm_id == "named"
        """
    ).assert_outcomes(passed=6)
    assert boots() == 4


def test_a_vm_ends_when_the_run_leaves_its_node(fake_suite: Suite) -> None:
    fake_suite(
        """
        import os, pytest
        from pathlib import Path
        live = lambda: {p.name for p in Path(os.environ["SMOLVM_STATE_DIR"], "vms").iterdir()}

        @pytest.mark.smolvm(scope="class")
        class TestGroup:
            def test_a(self, smolvm): type(self).vm = smolvm
            def test_b(self, smolvm): assert smolvm is self.vm

        def test_after():
            assert TestGroup.vm.deleted
            assert live() == set()
        """
    ).assert_outcomes(passed=3)


def test_the_session_fixture_is_one_vm_by_the_options_alone(
    fake_suite: Suite, boots: Count, pytester: pytest.Pytester
) -> None:
    source = """
        import pytest

        @pytest.fixture(scope="module")
        def service(smolvm_session):
            return smolvm_session

        @pytest.mark.smolvm(vcpu_count=7)
        def test_one(smolvm_session, service):
            assert smolvm_session is service
            assert smolvm_session.config.vcpu_count == 2
            assert smolvm_session.config.mem_size_mib == 300

        def test_two(smolvm_session):
            assert smolvm_session.run("true").ok
        """
    pytester.makepyfile(test_other=source)
    fake_suite(source, ini="smolvm_mem_size_mib = 300").assert_outcomes(passed=4)
    assert boots() == 1


@pytest.mark.parametrize(
    ("ending", "told"),
    [
        ("run('crash')", "had died"),
        ("stop()", "had been switched off"),
        ("run('poweroff')", "had been switched off"),
        ("delete()", "had been deleted"),
    ],
)
def test_a_shared_vm_that_ended_is_replaced_and_the_report_says_so(
    fake_suite: Suite, boots: Count, ending: str, told: str
) -> None:
    result = fake_suite(
        f"""
        import pytest
        pytestmark = pytest.mark.smolvm(scope="module")

        def test_ends_it(smolvm):
            try:
                smolvm.{ending}
            except Exception:
                pass

        def test_next(smolvm):
            assert smolvm.run("true").ok
            raise AssertionError("to see the report")
        """
    )
    result.assert_outcomes(passed=1, failed=1)
    assert boots() == 2
    result.stdout.fnmatch_lines(
        [
            f"*vm-*, which was shared, {told}: another took its place",
            "VMs: 2 booted, 0 restored, 0 reused, 1 replaced",
            f"replaced: vm-* {told}, before *::test_next",
        ]
    )


def test_a_paused_vm_goes_on_for_the_next_test(fake_suite: Suite, boots: Count) -> None:
    fake_suite(
        """
        import pytest
        pytestmark = pytest.mark.smolvm(scope="module")
        def test_pauses(smolvm): smolvm.pause()
        def test_next(smolvm): assert smolvm.run("true").ok
        """
    ).assert_outcomes(passed=2)
    assert boots() == 1


def test_a_session_vm_that_ended_is_replaced_with_all_that_was_built_on_it(
    fake_suite: Suite, boots: Count
) -> None:
    result = fake_suite(
        """
        import pytest

        @pytest.fixture(scope="session")
        def database(smolvm_session):
            return f"database in {smolvm_session.vm_id}"

        def test_ends_it(smolvm_session, database): smolvm_session.stop()

        def test_next(smolvm_session, database):
            assert smolvm_session.run("true").ok
            assert smolvm_session.vm_id in database
        """
    )
    result.assert_outcomes(passed=2)
    assert boots() == 2
    result.stdout.fnmatch_lines(["replaced: vm-* had been switched off, before *::test_next"])


def test_a_shared_vm_that_does_not_boot_is_not_tried_again_for_each_test(
    fake_suite: Suite, boots: Count
) -> None:
    result = fake_suite(
        """
        import pytest
        pytestmark = pytest.mark.smolvm(scope="module", boot_args="no-boot init=/init")
        @pytest.mark.parametrize("number", range(3))
        def test_one(smolvm, number): pass
        """
    )
    result.assert_outcomes(errors=3)
    assert boots() == 1


def test_preparation_runs_once_per_boot_before_the_first_test(fake_suite: Suite) -> None:
    fake_suite(
        """
        import pytest

        def install(vm): vm.run("echo installed")

        @pytest.mark.smolvm(scope="class", prepare=install)
        class TestFunction:
            def test_a(self, smolvm):
                assert [entry.command for entry in smolvm.commands] == ["echo installed"]
            def test_b(self, smolvm):
                assert [entry.command for entry in smolvm.commands] == ["echo installed"]

        @pytest.mark.smolvm(prepare=["echo one", "echo two"])
        def test_commands(smolvm):
            assert [entry.command for entry in smolvm.commands] == ["echo one", "echo two"]
        """
    ).assert_outcomes(passed=3)


def test_preparation_that_fails_is_an_error_of_the_test(
    fake_suite: Suite, kept: Callable[[], dict[str, str]]
) -> None:
    result = fake_suite(
        """
        import pytest
        @pytest.mark.smolvm(prepare=["fail"])
        def test_one(smolvm): pass
        """
    )
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*'fail' ended with exit status 1*"])
    assert kept() == {"test_one": "it could not be prepared"}


def test_the_factory_takes_what_the_marker_takes(fake_suite: Suite, boots: Count) -> None:
    fake_suite(
        """
        import pytest
        from pytest_smolvm import SmolVMError

        def test_many(smolvm_factory):
            first = smolvm_factory()
            second = smolvm_factory(vcpu_count=1, env_vars={}, prepare=["echo ready"])
            assert first.vm_id != second.vm_id
            assert second.config.vcpu_count == 1
            assert second.commands[-1].stdout == "ready\\n"
            assert smolvm_factory(vm_id="third").vm_id == "third"

        def test_wrong(smolvm_factory):
            with pytest.raises(SmolVMError, match="no argument 'cpus': the valid ones are.*vcpu"):
                smolvm_factory(cpus=2)
            with pytest.raises(SmolVMError, match="retain='some'.*all, failed, none"):
                smolvm_factory(retain="some")
            with pytest.raises(ValueError, match="greater than or equal to 128"):
                smolvm_factory(mem_size_mib=1)
        """
    ).assert_outcomes(passed=2)
    assert boots() == 3
