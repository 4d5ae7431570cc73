"""What is made ready ahead, and what is not: with fakes, whose starts are counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.plugin.conftest import Suite

Count = Callable[[], int]
ON = "smolvm_prefetch = 1"
# What waits until all that is made ready ahead is done.
CONFTEST = """
import pytest
from pytest_smolvm.plugin.session import existing_fleet

@pytest.fixture
def ahead(pytestconfig):
    def look():
        makings = list(existing_fleet(pytestconfig)._pool._makings)
        for making in makings:
            assert making.done.wait(30)
        return [making.vm for making in makings if making.ready]
    return look
"""


@pytest.fixture
def suite(fake_suite: Suite, pytester: pytest.Pytester) -> Suite:
    conftest = pytester.path / "conftest.py"
    conftest.write_text(conftest.read_text() + CONFTEST)
    return fake_suite


def test_each_test_gets_the_one_made_ready_for_it(suite: Suite, boots: Count) -> None:
    source = """
        import pytest
        expected = []

        @pytest.mark.parametrize("number", range(4))
        def test_one(smolvm, ahead, number):
            assert smolvm.run("true").ok
            assert expected in ([], [smolvm.vm_id])
            expected[:] = [vm.vm_id for vm in ahead()]
            assert len(expected) == (number < 3)
    """
    suite(source, ini=ON).assert_outcomes(passed=4)
    assert boots() == 4


def test_the_configuration_that_a_test_sees_is_that_of_the_vm_it_gets(
    suite: Suite, boots: Count
) -> None:
    source = """
        import pytest

        @pytest.mark.parametrize("number", range(3))
        def test_one(smolvm_config, smolvm, ahead, number):
            assert smolvm.config == smolvm_config
            ahead()

        class TestOther:
            @pytest.fixture
            def smolvm_config(self, smolvm_config, request):
                memory = 200 + request.node.callspec.params["number"]
                return smolvm_config.model_copy(update={"mem_size_mib": memory})

            @pytest.mark.parametrize("number", range(3))
            def test_two(self, smolvm_config, smolvm, ahead, number):
                assert smolvm.config.mem_size_mib == smolvm_config.mem_size_mib
                ahead()
    """
    suite(source, ini=ON).assert_outcomes(passed=6)
    # What was foreseen for the second of the class was wrong, and is foreseen no more.
    assert boots() == 7


def test_several_can_be_ready_at_once(suite: Suite, boots: Count) -> None:
    source = """
        import pytest

        @pytest.mark.parametrize("number", range(5))
        def test_one(smolvm, ahead, number):
            assert len(ahead()) == min(3, 4 - number)
    """
    suite(source, ini="smolvm_prefetch = 3").assert_outcomes(passed=5)
    assert boots() == 5


def test_tests_without_vms_are_looked_past(suite: Suite, boots: Count) -> None:
    source = """
        def test_one(smolvm): pass
        def test_none(): pass
        def test_two(smolvm): pass
        def test_last(ahead): assert ahead() == []
    """
    suite(source, ini=ON).assert_outcomes(passed=4)
    assert boots() == 2


def test_0_makes_none(suite: Suite, boots: Count) -> None:
    source = """
        from pytest_smolvm.plugin.session import existing_fleet
        def test_one(smolvm, pytestconfig): assert existing_fleet(pytestconfig)._pool is None
        def test_two(smolvm): pass
    """
    suite(source, "--smolvm-prefetch=0", ini=ON).assert_outcomes(passed=2)
    assert boots() == 2


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=" ".join)
def test_other_markers_other_vms_and_none_in_vain(
    suite: Suite, boots: Count, workers: list[str]
) -> None:
    source = """
        import pytest

        @pytest.mark.smolvm(mem_size_mib=200)
        def test_a(smolvm): assert smolvm.config.mem_size_mib == 200
        @pytest.mark.smolvm(vcpu_count=1)
        def test_b(smolvm): assert smolvm.config.vcpu_count == 1
        @pytest.mark.smolvm(scope="module")
        def test_c(smolvm): pass
        @pytest.mark.smolvm(scope="module")
        def test_d(smolvm): pass
        def test_e(smolvm): assert smolvm.config.mem_size_mib == 512
    """
    # With workers, tests that share a VM stay together.
    suite(source, *workers, ini=ON).assert_outcomes(passed=5)
    assert boots() == 4


def test_what_a_fixture_or_a_hook_makes_is_known_from_the_test_before(
    suite: Suite, boots: Count, pytester: pytest.Pytester
) -> None:
    conftest = pytester.path / "conftest.py"
    conftest.write_text(
        conftest.read_text()
        + """
def pytest_smolvm_config(item, config):
    return config.model_copy(update={"mem_size_mib": 222})
"""
    )
    source = """
        import pytest

        @pytest.fixture
        def smolvm_config(smolvm_config):
            return smolvm_config.model_copy(update={"vcpu_count": 1})

        @pytest.mark.parametrize("number", range(4))
        def test_one(smolvm, ahead, number):
            assert (smolvm.config.mem_size_mib, smolvm.config.vcpu_count) == (222, 1)
            assert len(ahead()) == (number < 3)
    """
    suite(source, ini=ON).assert_outcomes(passed=4)
    assert boots() == 4


def test_what_is_another_each_time_is_soon_not_made_any_more(suite: Suite, boots: Count) -> None:
    source = """
        import pytest

        @pytest.fixture
        def smolvm_config(smolvm_config, number):
            return smolvm_config.model_copy(update={"mem_size_mib": 200 + number})

        @pytest.mark.parametrize("number", range(5))
        def test_one(smolvm, number, ahead):
            assert smolvm.config.mem_size_mib == 200 + number
            ahead()
    """
    suite(source, ini=ON).assert_outcomes(passed=5)
    assert boots() == 6


def test_more_vms_of_a_test_change_nothing(suite: Suite, boots: Count) -> None:
    source = """
        import pytest

        @pytest.mark.parametrize("number", range(3))
        def test_one(smolvm, smolvm_factory, ahead, number):
            assert smolvm_factory().vm_id != smolvm.vm_id

        def test_two(smolvm, ahead): pass

        @pytest.mark.parametrize("number", range(2))
        def test_three(smolvm, smolvm_factory, ahead, number):
            smolvm_factory()
            assert len(ahead()) == (number == 0)
    """
    suite(source, ini=ON).assert_outcomes(passed=6)
    assert boots() == 6 + 5


def test_a_vm_with_a_name_is_not_made_ahead(suite: Suite, boots: Count) -> None:
    source = """
        import pytest

        @pytest.mark.smolvm(vm_id="web")
        @pytest.mark.parametrize("number", range(3))
        def test_one(smolvm, ahead, number):
            assert smolvm.vm_id == "web"
            assert ahead() == []
    """
    suite(source, ini=ON).assert_outcomes(passed=3)
    assert boots() == 3


def test_what_prepares_a_vm_runs_in_the_tests_own_thread(suite: Suite, boots: Count) -> None:
    source = """
        import threading
        import pytest

        def install(vm):
            assert threading.current_thread() is threading.main_thread()

        @pytest.mark.smolvm(prepare=install)
        @pytest.mark.parametrize("number", range(3))
        def test_one(smolvm, ahead, number): assert ahead() == []
    """
    suite(source, ini=ON).assert_outcomes(passed=3)
    assert boots() == 3


def test_one_that_died_meanwhile_is_replaced(suite: Suite, boots: Count) -> None:
    source = """
        def test_one(smolvm, ahead):
            (vm,) = ahead()
            vm._machine.crash()

        def test_two(smolvm): assert smolvm.run("true").ok
    """
    suite(source, ini=ON).assert_outcomes(passed=2)
    assert boots() == 3


def test_one_that_cannot_boot_is_an_error_of_its_own_test(suite: Suite) -> None:
    source = """
        import pytest

        def test_one(smolvm, ahead): assert ahead() == []

        @pytest.mark.smolvm(boot_args="no-boot init=/init")
        def test_two(smolvm): pass

        def test_three(smolvm): pass
    """
    result = suite(source, "--smolvm-retain=none", ini=ON)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*died while booting*"])


def test_one_that_takes_long_is_given_up_when_the_run_ends(
    suite: Suite, kept: Callable[[], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_BOOT_S", "1")
    source = """
        def test_bad(smolvm): assert 0
        def test_two(smolvm): pass
    """
    suite(source, "-x", "--smolvm-retain=none", ini=ON).assert_outcomes(failed=1)
    # kept() checks that none is live any more.
    assert kept() == {}
