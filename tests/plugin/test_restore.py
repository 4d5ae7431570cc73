"""Restore, prepare and prefetch in runs of pytest, with real guests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import qemu_pids
from tests.plugin.runs import interrupt, long_test, start

ONE = "def test_one(smolvm): assert smolvm.run('true').ok\n"


@pytest.fixture(autouse=True)
def small(pytester: pytest.Pytester, micro: tuple[Path, Path]) -> None:
    pytester.makeini("[pytest]\nsmolvm_mem_size_mib = 256\nsmolvm_prefetch = 0\n")


def vms_line(result: pytest.RunResult) -> str:
    (line,) = [line for line in result.stdout.lines if line.startswith("VMs: ")]
    return line.removeprefix("VMs: ")


def test_the_second_run_boots_nothing(pytester: pytest.Pytester, no_templates: Path) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("number", range(3))
        def test_one(smolvm, number):
            assert smolvm.run("true").ok
        """
    )
    assert vms_line(pytester.runpytest_subprocess()) == (
        "1 booted, 2 restored, 0 reused; 1 template made"
    )
    assert vms_line(pytester.runpytest_subprocess()) == "0 booted, 3 restored, 0 reused"


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        (ONE, ["--smolvm-no-restore"]),
        (ONE, ["-o", "smolvm_restore=false"]),
        ("import pytest\npytestmark = pytest.mark.smolvm(restore=False)\n" + ONE, []),
    ],
    ids=["option", "ini", "marker"],
)
def test_who_wants_a_boot_gets_one(
    pytester: pytest.Pytester, source: str, arguments: list[str]
) -> None:
    pytester.makepyfile(source)
    result = pytester.runpytest_subprocess(*arguments)
    assert vms_line(result) == "1 booted, 0 restored, 0 reused"


def test_a_damaged_template_is_told_of_once_and_made_anew(
    pytester: pytest.Pytester, no_templates: Path
) -> None:
    pytester.makepyfile(ONE + ONE.replace("one", "two"))
    pytester.runpytest_subprocess().assert_outcomes(passed=2)
    (memory,) = (no_templates / "templates").glob("*/memory")
    with memory.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"bit rot")
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=2)
    assert vms_line(result) == "1 booted, 1 restored, 0 reused; 1 template made"
    told = [line for line in result.stdout.lines if "made anew" in line and "damaged" in line]
    assert len(told) == 1


PREPARED = """
import pytest

def install(vm):
    vm.write_text("/root/installed", "{0}")
    vm.run("sleep 1000 > /dev/null 2>&1 & echo $! > /run/service.pid")
    open("prepared.log", "a").write("{0}\\n")

@pytest.mark.smolvm(prepare=install)
@pytest.mark.parametrize("number", range(3))
def test_installed(smolvm, number):
    assert smolvm.read_text("/root/installed") == "{0}"
    assert smolvm.run("kill -0 $(cat /run/service.pid) && kill $(cat /run/service.pid)").ok
    smolvm.run("rm /root/installed", check=True)
"""


def test_a_preparation_is_done_once_and_all_start_from_there(
    pytester: pytest.Pytester, no_templates: Path
) -> None:
    log = pytester.path / "prepared.log"
    pytester.makepyfile(PREPARED.format("first"))
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=3)
    assert vms_line(result) == "1 booted, 2 restored, 0 reused; 2 templates made"
    again = pytester.runpytest_subprocess()
    assert vms_line(again) == "0 booted, 3 restored, 0 reused"
    assert log.read_text() == "first\n"
    # Another function, another result; the guest has booted already.
    pytester.makepyfile(PREPARED.format("second"))
    changed = pytester.runpytest_subprocess()
    assert vms_line(changed) == "0 booted, 3 restored, 0 reused; 1 template made"
    assert log.read_text() == "first\nsecond\n"


def test_a_preparation_sees_the_variables_and_keeps_apart_what_has_others(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        import pytest

        commands = ["echo $WHO > /root/who"]

        @pytest.mark.parametrize("number", range(2))
        @pytest.mark.smolvm(prepare=commands, env_vars={"WHO": "a"})
        def test_a(smolvm, number):
            assert smolvm.run("cat /root/who; echo $WHO").stdout == "a\\na\\n"

        @pytest.mark.smolvm(prepare=commands, env_vars={"WHO": "b"})
        def test_b(smolvm):
            assert smolvm.run("cat /root/who; echo $WHO").stdout == "b\\nb\\n"
        """
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=3)


def test_a_preparation_without_a_name_runs_for_each_vm_and_the_run_says_so(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        import pytest

        handle = open("prepared.log", "a")

        def by(handle):
            def prepare(vm):
                handle.write("prepared\\n")
                handle.flush()
            return prepare

        @pytest.mark.smolvm(prepare=by(handle))
        @pytest.mark.parametrize("number", range(2))
        def test_one(smolvm, number): pass

        @pytest.mark.smolvm(prepare=by(handle), prepare_key="a name of its own 7f3a")
        @pytest.mark.parametrize("number", range(2))
        def test_two(smolvm, number): pass
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=4)
    told = [line for line in result.stdout.lines if "prepare is run for each VM" in line]
    assert len(told) == 1
    assert "TextIOWrapper" in told[0]
    assert "give prepare_key" in told[0]
    # The template of the other may be there from a run before.
    assert (pytester.path / "prepared.log").read_text().count("prepared") in (2, 3)


def test_a_preparation_that_fails_keeps_the_vm_and_leaves_no_template(
    pytester: pytest.Pytester, no_templates: Path
) -> None:
    pytester.makepyfile(
        """
        import pytest

        def install(vm):
            vm.run("echo half > /root/half; exit 3", check=True)

        @pytest.mark.smolvm(prepare=install)
        def test_one(smolvm): pass
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*ended with exit status 3*", "kept: * could not be prepared"])
    templates = list((no_templates / "templates").glob("[!.]*/template.json"))
    assert len(templates) == 1  # of the guest that has booted
    (kept,) = (no_templates / "vms").iterdir()
    from pytest_smolvm import SmolVM

    vm = SmolVM.from_id(kept.name).start()
    assert vm.read_text("/root/half") == "half\n"
    vm.delete()


# -- prefetch ---------------------------------------------------------------------


def test_the_next_vm_is_ready_when_its_test_begins(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        from pytest_smolvm.plugin.session import existing_fleet

        ready = []

        @pytest.mark.parametrize("number", range(3))
        def test_one(smolvm, number, pytestconfig):
            assert smolvm.run("hostname").output == smolvm.vm_id
            assert ready[-1:] in ([], [smolvm.vm_id])
            makings = existing_fleet(pytestconfig)._pool._makings
            assert len(makings) == (number < 2)
            for making in makings:
                # Ready while this test runs: logged in, and nobody's yet.
                assert making.done.wait(60) and making.ready
                assert making.vm.run("true").ok
                ready.append(making.vm.vm_id)

        def test_all_were_taken():
            assert len(ready) == 2
        """
    )
    result = pytester.runpytest_subprocess("--smolvm-prefetch=1", "--smolvm-retain=none")
    result.assert_outcomes(passed=4)
    # None but those that tests had.
    counts = re.findall(r"\d+", vms_line(result))
    assert int(counts[0]) + int(counts[1]) == 3


def test_what_was_made_ready_and_is_not_wanted_goes(
    pytester: pytest.Pytester, state_dir: Path
) -> None:
    others = qemu_pids()
    pytester.makepyfile(
        """
        import pytest, time

        def test_one(smolvm): time.sleep(1)
        def test_fails(smolvm): assert False
        def test_two(smolvm): pass
        """
    )
    result = pytester.runpytest_subprocess("--smolvm-prefetch=2", "-x", "--smolvm-retain=none")
    result.assert_outcomes(passed=1, failed=1)
    assert qemu_pids() == others
    assert not [path for path in (state_dir / "vms").iterdir() if path.name not in owned(state_dir)]


def owned(state_dir: Path) -> set[str]:
    """The VMs that this process has for other tests."""
    from pytest_smolvm.store import Store

    store = Store(state_dir)
    return {path.name for path in store.vms.iterdir() if store.is_owned(path.name)}


def test_ctrl_c_while_one_is_made_ready_leaves_nothing(
    pytester: pytest.Pytester, no_vms: Path
) -> None:
    marker = pytester.path / "in-the-test"
    pytester.makepyfile(long_test(marker) + "\ndef test_next(smolvm): pass\n")
    output = interrupt(start("--smolvm-retain=none", "--smolvm-prefetch=1"), marker.exists)
    assert "KeyboardInterrupt" in output
    assert list((no_vms / "vms").iterdir()) == []
    assert qemu_pids() == set()


def test_none_is_made_ready_where_memory_is_short(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import pytest_smolvm.admission as admission
        admission.RESERVE_MIB = 1 << 40
        """
    )
    pytester.makepyfile(
        """
        import os, time
        from pathlib import Path

        def test_one(smolvm):
            time.sleep(1)
            vms = Path(os.environ["SMOLVM_STATE_DIR"]) / "vms"
            assert [p.name for p in vms.iterdir()] == [smolvm.vm_id]

        def test_two(smolvm): pass
        """
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOLVM_STATE_DIR", str(own_vms(pytester)))
        pytester.runpytest_subprocess("--smolvm-prefetch=1").assert_outcomes(passed=2)


def own_vms(pytester: pytest.Pytester) -> Path:
    from tests.conftest import with_shared_caches

    root = pytester.path / "own-vms"
    root.mkdir()
    return with_shared_caches(root)
