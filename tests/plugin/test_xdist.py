"""pytest-xdist: each worker its own VMs, and no more of them than is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.plugin.conftest import CONFTEST, ROOT, Suite, entries
from tests.plugin.runs import interrupt, start

Count = Callable[[], int]
Kept = Callable[[], dict[str, str]]

TEN = """
import os, pytest
from pathlib import Path

@pytest.mark.parametrize("number", range(5))
class TestGroup:
    def test_one(self, smolvm, number): tell(smolvm)

@pytest.mark.parametrize("number", range(5))
def test_two(smolvm, number): tell(smolvm)

def tell(vm):
    with open("who", "a") as file:
        file.write(f"{vm.vm_id} {os.getpid()} {vm.directory.parents[1]}\\n")
"""


@pytest.mark.parametrize("dist", ["load", "loadscope", "loadfile", "loadgroup", "worksteal"])
def test_each_worker_has_its_own_vms_whatever_the_distribution(
    fake_suite: Suite, boots: Count, kept: Kept, pytester: pytest.Pytester, dist: str
) -> None:
    pytester.makepyfile(test_other=TEN)
    fake_suite(TEN, "-n2", f"--dist={dist}").assert_outcomes(passed=20)
    assert boots() == 20
    told = [line.split() for line in (pytester.path / "who").read_text().splitlines()]
    assert len({vm_id for vm_id, *_ in told}) == 20
    assert len({pid for _, pid, _ in told}) == 2
    assert len({state for *_, state in told}) == 1
    assert kept() == {}


SHARED = """
import pytest

class TestOne:
    def test_a(self, smolvm): pass
    def test_b(self, smolvm): pass

class TestTwo:
    def test_a(self, smolvm): pass
    def test_b(self, smolvm): pass
    @pytest.mark.smolvm(vcpu_count=1)
    def test_other(self, smolvm): pass
    @pytest.mark.smolvm(vcpu_count=1)
    def test_other_too(self, smolvm): pass

def test_without(): pass
"""


@pytest.mark.parametrize(
    ("dist", "scope", "vms"),
    [
        ("loadgroup", "class", 6),
        ("loadgroup", "module", 4),
        ("loadgroup", "session", 2),
        ("loadscope", "class", 6),
        ("loadfile", "module", 4),
    ],
)
def test_tests_that_share_a_vm_stay_together_where_that_saves_boots(
    fake_suite: Suite, boots: Count, pytester: pytest.Pytester, dist: str, scope: str, vms: int
) -> None:
    pytester.makepyfile(test_second=SHARED)
    result = fake_suite(SHARED, "-n2", f"--dist={dist}", f"--smolvm-scope={scope}")
    result.assert_outcomes(passed=14)
    assert boots() == vms


def test_the_session_vm_is_booted_by_one_worker_alone_if_tests_are_grouped(
    fake_suite: Suite, boots: Count, pytester: pytest.Pytester
) -> None:
    source = "def test_a(smolvm_session): pass\ndef test_b(smolvm_session): pass\n"
    pytester.makepyfile(test_second=source, test_third="def test_other(): pass")
    fake_suite(source, "-n2", "--dist=loadgroup").assert_outcomes(passed=5)
    assert boots() == 1


def test_without_groups_each_worker_has_one_vm_for_the_session(
    fake_suite: Suite, boots: Count, kept: Kept
) -> None:
    source = "import pytest\n@pytest.mark.parametrize('n', range(8))\n"
    source += "def test_one(smolvm_session, n): pass\n"
    fake_suite(source, "-n2", "--dist=load").assert_outcomes(passed=8)
    assert boots() == 2
    assert kept() == {}


def test_all_workers_give_a_group_the_same_name_whatever_a_marker_holds(
    fake_suite: Suite, boots: Count
) -> None:
    # A function's address and a set's order differ between workers, which would then
    # seem to have collected different tests.
    fake_suite(
        """
        import pytest
        from pathlib import Path

        def install(vm): vm.run("echo installed")

        @pytest.mark.smolvm(scope="module", prepare=install, kernel_path=Path("kernel"))
        @pytest.mark.parametrize("number", range(4))
        def test_one(smolvm, number): pass

        @pytest.mark.smolvm(scope="module", prepare=lambda vm: None, bogus={"a", "b", "c"})
        def test_wrong(smolvm): pass
        """,
        *("-n2", "--dist=loadgroup"),
    ).assert_outcomes(passed=4, errors=1)
    assert boots() == 1


def test_a_group_that_the_user_gave_stands(fake_suite: Suite, pytester: pytest.Pytester) -> None:
    fake_suite(
        """
        import os, pytest
        pytestmark = [pytest.mark.xdist_group("mine"), pytest.mark.smolvm(scope="class")]

        @pytest.mark.parametrize("number", range(6))
        class TestGroup:
            def test_one(self, smolvm, number): open("who", "a").write(f"{os.getpid()}\\n")
            def test_two(self, smolvm_factory, number): open("who", "a").write(f"{os.getpid()}\\n")
        """,
        *("-n2", "--dist=loadgroup"),
    ).assert_outcomes(passed=12)
    assert len(set((pytester.path / "who").read_text().split())) == 1


def test_a_test_is_called_by_its_own_name_although_xdist_adds_a_group_to_it(
    fake_suite: Suite, own_state: Path
) -> None:
    result = fake_suite(
        "def test_one(smolvm): assert 0\n",
        *("-n2", "--dist=loadgroup", "--smolvm-scope=session", "-v"),
    )
    result.stdout.fnmatch_lines(["*::test_one@smolvm-session-* "])
    (entry,) = entries(own_state)
    assert entry.record.usage.test.endswith(".py::test_one")


AUTO = (
    CONFTEST
    + """
from pytest_smolvm.plugin import distribution
distribution.available_mib = lambda: {available}
"""
)


@pytest.mark.parametrize(
    ("available", "memory", "workers"),
    [(8000, 512, 4), (8000, 4000, 1), (1700, 512, 2), (100, 512, 1), (None, 512, 4)],
)
def test_n_auto_is_capped_by_memory(
    fake_suite: Suite,
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    available: int | None,
    memory: int,
    workers: int,
) -> None:
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "4")
    pytester.makeconftest(AUTO.format(root=str(ROOT), available=available))
    ini = f"smolvm_mem_size_mib = {memory}"
    result = fake_suite("def test_one(smolvm): pass\n", "-nauto", ini=ini)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"created: {workers}/{workers} worker*"])
    said = [line for line in result.stdout.lines if line.startswith("smolvm: -n auto")]
    if workers == 4:
        assert said == []
    else:
        assert said[0].startswith(f"smolvm: -n auto starts {workers} of 4 workers: ")
        assert f"{available} MiB of memory" in said[0]


def test_n_logical_is_capped_too_and_called_by_its_name(
    fake_suite: Suite, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "4")
    pytester.makeconftest(AUTO.format(root=str(ROOT), available=1000))
    result = fake_suite("def test_one(smolvm): pass\n", "-nlogical")
    result.stdout.fnmatch_lines(["smolvm: -n logical starts 1 of 4 workers: *place of logical*"])


def test_a_number_of_workers_is_taken_as_it_is(
    fake_suite: Suite, pytester: pytest.Pytester
) -> None:
    pytester.makeconftest(AUTO.format(root=str(ROOT), available=1))
    result = fake_suite("def test_one(smolvm): pass\n", "-n3")
    result.stdout.fnmatch_lines(["created: 3/3 workers"])


def test_a_worker_that_crashes_is_replaced_and_the_rest_of_the_tests_run(
    fake_suite: Suite, own_state: Path
) -> None:
    result = fake_suite(
        """
        import os, pytest
        def test_crash(smolvm, smolvm_factory):
            smolvm_factory()
            os._exit(3)
        @pytest.mark.parametrize("number", range(6))
        def test_good(smolvm, number): pass
        """,
        *("-n2", "--smolvm-scope=function"),
    )
    result.assert_outcomes(passed=6, failed=1)
    found = entries(own_state)
    assert len(found) == 2
    for entry in found:
        assert not entry.live
        assert entry.record.usage.test.endswith("::test_crash")
        assert entry.record.machine_pid is None
        assert "README.txt" in {path.name for path in entry.path.iterdir()}


def test_workers_that_are_interrupted_end_their_vms_themselves(
    fake_suite: Suite, pytester: pytest.Pytester, kept: Kept
) -> None:
    marker = pytester.path / "hanging"
    source = """
        import pytest
        @pytest.mark.parametrize("number", range(2))
        def test_long(smolvm, smolvm_session, number): smolvm.run(f"hang {marker}-{{number}}")
        """
    fake_suite(source.format(marker=marker), "--collect-only")
    interrupt(start("-n2"), *(Path(f"{marker}-{number}").exists for number in range(2)))
    # Had a worker been killed, its owner's death would be the reason.
    assert kept() == {
        "test_long[0]": "the run was interrupted in it",
        "test_long[1]": "the run was interrupted in it",
    }


def test_the_vms_of_a_worker_that_xdist_had_to_kill_are_kept_too(
    fake_suite: Suite, pytester: pytest.Pytester, kept: Kept
) -> None:
    marker = pytester.path / "hanging"
    source = f"""
        import signal
        def test_deaf(smolvm):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            while True: smolvm.run("hang {marker}")
        """
    fake_suite(source, "--collect-only")
    output = interrupt(start("-n1"), marker.exists)
    (reason,) = kept().values()
    assert "died" in reason
    assert "kept: vm-" in output


def test_two_hundred_tests_on_two_workers_do_not_get_in_each_others_way(
    fake_suite: Suite, pytester: pytest.Pytester, boots: Count, kept: Kept
) -> None:
    fake_suite(
        """
        import pytest
        @pytest.mark.parametrize("number", range(200))
        def test_one(smolvm, number): assert smolvm.run("true").ok
        """,
        "-n2",
    ).assert_outcomes(passed=200)
    assert boots() == 200
    assert kept() == {}
