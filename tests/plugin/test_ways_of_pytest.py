"""What pytest users do every day works as they expect it, with VMs in their tests."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.plugin.conftest import Suite

Count = Callable[[], int]

TWO_FAIL = """
def test_good(smolvm): assert smolvm.run("true").ok
def test_bad(smolvm): assert smolvm.run("fail").ok
def test_also_bad(smolvm): assert smolvm.run("fail").ok
def test_last(smolvm): assert smolvm.run("true").ok
"""


@pytest.mark.parametrize(
    "option", ["--collect-only", "--setup-plan", "--fixtures", "--fixtures-per-test", "--markers"]
)
def test_looking_boots_nothing_and_writes_nothing(
    fake_suite: Suite, boots: Count, own_state: Path, option: str
) -> None:
    result = fake_suite(TWO_FAIL, option)
    assert result.ret == 0
    assert boots() == 0
    result.stdout.no_fnmatch_line("smolvm: *")
    assert not own_state.exists()


def test_setup_plan_shows_the_fixtures(fake_suite: Suite) -> None:
    result = fake_suite(TWO_FAIL, "--setup-plan")
    result.stdout.fnmatch_lines(["*SETUP    F smolvm*", "*TEARDOWN F smolvm*"])


def test_setup_show_boots_and_shows(fake_suite: Suite, boots: Count) -> None:
    result = fake_suite("def test_one(smolvm): pass", "--setup-show")
    result.stdout.fnmatch_lines(["*SETUP    F smolvm*"])
    assert boots() == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--strict-markers", "--strict-config"],
        ["-p", "no:xdist"],
        ["-p", "no:cacheprovider"],
        ["-p", "no:terminal"],
        ["-p", "no:capture"],
        ["-p", "no:junitxml"],
        ["-p", "no:logging"],
        ["-p", "no:debugging"],
        ["--import-mode=importlib"],
        ["-W", "error"],
    ],
    ids=" ".join,
)
def test_it_works_with_other_plugins_switched_off_and_strictness_on(
    fake_suite: Suite, boots: Count, kept: Callable[[], dict[str, str]], arguments: list[str]
) -> None:
    result = fake_suite(TWO_FAIL, *arguments)
    assert result.ret == pytest.ExitCode.TESTS_FAILED, result.stdout.str() + result.stderr.str()
    assert boots() == 4
    assert set(kept()) == {"test_bad", "test_also_bad"}


def test_the_plugin_itself_can_be_switched_off(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_one(): pass\ndef test_two(smolvm): pass\n")
    result = pytester.runpytest_subprocess("-p", "no:smolvm")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*fixture 'smolvm' not found*"])


def test_o_overrides_an_ini_option(fake_suite: Suite) -> None:
    fake_suite(
        "def test_one(smolvm): assert smolvm.config.mem_size_mib == 222",
        *("-o", "smolvm_mem_size_mib=222"),
        ini="smolvm_mem_size_mib = 333",
    ).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("arguments", "booted"), [(["-x"], 2), (["--maxfail=1"], 2), (["--maxfail=2"], 3)]
)
def test_a_run_that_stops_early_boots_no_more_and_leaves_nothing_running(
    fake_suite: Suite,
    boots: Count,
    kept: Callable[[], dict[str, str]],
    arguments: list[str],
    booted: int,
) -> None:
    result = fake_suite(TWO_FAIL, *arguments, "--smolvm-scope=function")
    assert boots() == booted
    result.assert_outcomes(passed=1, failed=booted - 1)
    # kept() checks that none is live any more.
    assert kept() == dict.fromkeys(["test_bad", "test_also_bad"][: booted - 1], "the test failed")


def test_a_session_vm_ends_when_x_stops_the_run(
    fake_suite: Suite, boots: Count, kept: Callable[[], dict[str, str]]
) -> None:
    fake_suite(TWO_FAIL, "-x", "--smolvm-scope=session")
    assert boots() == 1
    assert kept() == {"test_bad": "the test failed"}


def test_lf_boots_for_the_failed_tests_alone(fake_suite: Suite, boots: Count) -> None:
    fake_suite(TWO_FAIL)
    assert boots() == 4
    fake_suite(TWO_FAIL, "--lf").assert_outcomes(failed=2)
    assert boots() == 6


def test_stepwise_goes_on_where_it_stopped(fake_suite: Suite, boots: Count) -> None:
    fake_suite(TWO_FAIL, "--sw")
    assert boots() == 2
    fake_suite(TWO_FAIL, "--sw").assert_outcomes(failed=1, deselected=1)
    assert boots() == 3


def test_each_parameter_of_a_test_has_a_vm_of_its_own(fake_suite: Suite, boots: Count) -> None:
    fake_suite(
        """
        import pytest
        seen = set()

        @pytest.mark.parametrize(
            "memory",
            [
                pytest.param(200, marks=pytest.mark.smolvm(mem_size_mib=200)),
                pytest.param(300, marks=pytest.mark.smolvm(mem_size_mib=300)),
                512,
            ],
        )
        def test_one(smolvm, memory):
            assert smolvm.config.mem_size_mib == memory
            assert smolvm.vm_id not in seen
            seen.add(smolvm.vm_id)
        """
    ).assert_outcomes(passed=3)
    assert boots() == 3


def test_a_parametrized_fixture_can_ask_for_vms(fake_suite: Suite, boots: Count) -> None:
    fake_suite(
        """
        import pytest

        @pytest.fixture(params=[200, 300])
        def smolvm_config(smolvm_config, request):
            return smolvm_config.model_copy(update={"mem_size_mib": request.param})

        def test_one(smolvm, smolvm_config):
            assert smolvm.config.mem_size_mib == smolvm_config.mem_size_mib
        """
    ).assert_outcomes(passed=2)
    assert boots() == 2


def test_methods_of_classes_with_xunit_set_up(fake_suite: Suite, boots: Count) -> None:
    fake_suite(
        """
        import pytest

        @pytest.mark.smolvm(mem_size_mib=200)
        class TestBase:
            @pytest.fixture(autouse=True)
            def machine(self, smolvm):
                self.vm = smolvm
                yield
                assert smolvm.run("true").ok

            def test_one(self): assert self.vm.config.mem_size_mib == 200

        class TestDerived(TestBase):
            @pytest.mark.smolvm(mem_size_mib=300)
            def test_two(self): assert self.vm.config.mem_size_mib == 300
        """
    ).assert_outcomes(passed=3)
    assert boots() == 3


def test_a_unittest_testcase_gets_a_vm_through_a_fixture(
    fake_suite: Suite, boots: Count, kept: Callable[[], dict[str, str]]
) -> None:
    result = fake_suite(
        """
        import unittest
        import pytest

        @pytest.mark.smolvm(mem_size_mib=200)
        class GroupTest(unittest.TestCase):
            @pytest.fixture(autouse=True)
            def machine(self, smolvm):
                self.vm = smolvm

            def test_one(self):
                self.assertEqual(self.vm.config.mem_size_mib, 200)

            @pytest.mark.smolvm(mem_size_mib=300)
            def test_two(self):
                self.assertEqual(self.vm.config.mem_size_mib, 300)

            def test_wrong(self):
                self.fail("on purpose")

            @unittest.expectedFailure
            def test_expected(self):
                self.fail("on purpose")

            def tearDown(self):
                self.assertTrue(self.vm.run("true").ok)

        @pytest.mark.usefixtures("smolvm")
        class UsingTest(unittest.TestCase):
            def test_one(self): pass
        """
    )
    result.assert_outcomes(passed=3, failed=1, xfailed=1)
    assert boots() == 5
    assert kept() == {"test_wrong": "the test failed"}


def test_a_class_of_unittest_shares_a_vm_by_scope(fake_suite: Suite, boots: Count) -> None:
    fake_suite(
        """
        import unittest
        import pytest

        @pytest.mark.smolvm(scope="class")
        @pytest.mark.usefixtures("smolvm")
        class GroupTest(unittest.TestCase):
            def test_one(self): pass
            def test_two(self): pass
        """
    ).assert_outcomes(passed=2)
    assert boots() == 1


@pytest.mark.usefixtures("with_other_plugins")
def test_async_tests_and_fixtures(
    fake_suite: Suite, boots: Count, kept: Callable[[], dict[str, str]]
) -> None:
    result = fake_suite(
        """
        import asyncio
        import pytest
        import pytest_asyncio

        @pytest_asyncio.fixture
        async def service(smolvm):
            yield smolvm.vm_id
            assert (await asyncio.to_thread(smolvm.run, "true")).ok

        @pytest.mark.asyncio
        async def test_one(smolvm, service):
            assert service == smolvm.vm_id
            result = await asyncio.to_thread(smolvm.run, "echo hello")
            assert result.output == "hello"

        @pytest.mark.asyncio
        async def test_wrong(smolvm):
            assert smolvm.run("fail").ok
        """,
        ini="asyncio_default_fixture_loop_scope = function",
    )
    result.assert_outcomes(passed=1, failed=1)
    assert boots() == 2
    assert kept() == {"test_wrong": "the test failed"}


def test_a_doctest_may_take_a_vm(fake_suite: Suite, boots: Count) -> None:
    fake_suite(
        '''
        def about():
            """
            >>> getfixture("smolvm").run("echo hello").output
            'hello'
            """
        ''',
        "--doctest-modules",
    ).assert_outcomes(passed=1)
    assert boots() == 1


def test_getfixturevalue_boots_when_it_is_called(
    fake_suite: Suite, boots: Count, kept: Callable[[], dict[str, str]]
) -> None:
    result = fake_suite(
        """
        def test_one(request):
            assert request.getfixturevalue("smolvm").run("true").ok
        def test_two(request):
            assert request.getfixturevalue("smolvm_session").run("true").ok
        def test_three(request):
            assert request.getfixturevalue("smolvm_session").run("fail").ok
        def test_four(): pass
        """
    )
    result.assert_outcomes(passed=3, failed=1)
    assert boots() == 2
    assert kept() == {"test_three": "the test failed"}
    result.stdout.fnmatch_lines(["*last commands in vm-*", "VMs: 2 booted, 0 restored, 1 reused"])


@pytest.mark.usefixtures("with_other_plugins")
def test_a_test_that_is_run_again_gets_a_new_vm(
    fake_suite: Suite, boots: Count, kept: Callable[[], dict[str, str]]
) -> None:
    result = fake_suite(
        """
        tries = []
        def test_flaky(smolvm):
            tries.append(smolvm.vm_id)
            assert len(set(tries)) == len(tries) == 2
        """,
        "--reruns=2",
    )
    assert re.search(r"1 passed, 1 rerun in", result.stdout.str())
    assert boots() == 2
    # The failure has happened, and is not to be had again at will.
    assert kept() == {"test_flaky": "the test failed"}


def test_two_runs_in_one_process_do_not_know_each_other(
    fake_suite: Suite, pytester: pytest.Pytester, boots: Count
) -> None:
    fake_suite("def test_one(smolvm): assert smolvm.run('true').ok", "--collect-only")
    script = "import pytest\nassert pytest.main() == 0\nassert pytest.main() == 0\n"
    assert pytester.run(sys.executable, "-c", script, timeout=60).ret == 0
    assert boots() == 2
