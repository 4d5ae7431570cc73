"""What a run says of its VMs: at its head, with a failure, at its end, and in files."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.plugin.conftest import Suite, entries

ONE = "def test_one(smolvm): assert smolvm.run('true').ok\n"
HEADER = "smolvm: fake 1.0, none (not kvm: it is a fake), image */rootfs"


@pytest.mark.parametrize(
    "source",
    [
        "def test_one(): pass",
        "import pytest\n@pytest.mark.smolvm\ndef test_one(): pass",
        "import pytest\n@pytest.mark.skip\ndef test_one(smolvm): pass",
        "def test_one(): assert 0",
    ],
    ids=["no VM", "marker only", "skipped", "failed"],
)
@pytest.mark.parametrize("arguments", [[], ["-v"], ["-n1"]], ids=" ".join)
def test_nothing_is_printed_in_a_run_that_used_no_vm(
    fake_suite: Suite, own_state: Path, source: str, arguments: list[str]
) -> None:
    text = fake_suite(source, *arguments).stdout.str()
    lines = [line for line in text.splitlines() if "test_nothing" not in line]
    assert not [line for line in lines if "smolvm" in line and not line.startswith("plugins:")]
    assert "VMs:" not in text
    assert not own_state.exists()


@pytest.mark.parametrize("arguments", [[], ["-v"], ["-n1"], ["-n2"]], ids=" ".join)
def test_the_header_says_once_what_vms_run_on(fake_suite: Suite, arguments: list[str]) -> None:
    result = fake_suite(ONE + ONE.replace("one", "two"), *arguments)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines([HEADER])
    assert result.stdout.str().count("fake 1.0") == 1


def test_a_quiet_run_says_only_what_was_kept(fake_suite: Suite) -> None:
    assert "smolvm" not in fake_suite(ONE, "-q").stdout.str().replace("pytest-smolvm", "")
    result = fake_suite("def test_one(smolvm): assert 0", "-q", "--no-header")
    result.stdout.no_fnmatch_line("smolvm: fake*")
    result.stdout.fnmatch_lines(["kept: vm-*, *::test_one: the test failed"])


def test_a_header_that_cannot_be_had_says_why(
    pytester: pytest.Pytester, files: dict[str, Path], own_state: Path
) -> None:
    pytester.makepyfile(ONE)
    result = pytester.runpytest_subprocess(
        "--smolvm-accel=hvf", "--smolvm-kernel=kernel", "--smolvm-rootfs=rootfs"
    )
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["smolvm: *hvf*"])


def test_a_failure_has_sections_on_console_commands_and_time(fake_suite: Suite) -> None:
    result = fake_suite(
        r"""
        def test_one(smolvm):
            with (smolvm.directory / "console.log").open("a") as console:
                console.write("".join(f"line {number}\n" for number in range(100)))
                console.write("\x1b[2J\x1b[31mred\x1b[0m \x9b31mand \x1b]0;title\x07more\n")
            smolvm.run("echo \x1b[31mhello")
            smolvm.run("fail")
            assert 0
        """
    )
    result.stdout.fnmatch_lines(
        [
            "*console of vm-* (last * lines)*",
            "line 99",
            "red *and more",
            "*last commands in vm-*",
            "$ echo *hello",
            "[[]exit status 0, * s]",
            "  hello",
            "$ fail",
            "[[]exit status 1, * s]",
            "*where the time of vm-* went*",
            "*launch * s, *commands (2) * s",
        ]
    )
    text = result.stdout.str()
    for character in "\x1b\x9b\x07":
        assert character not in text, "the guest could have driven the terminal"
    assert "line 10\n" not in text, "all of the console would bury the failure"


def test_show_capture_no_hides_the_sections(fake_suite: Suite) -> None:
    result = fake_suite("def test_one(smolvm): assert 0", "--show-capture=no")
    assert "console of" not in result.stdout.str()


def test_a_failure_of_a_test_without_a_vm_has_no_such_section(fake_suite: Suite) -> None:
    result = fake_suite("def test_vm(smolvm_session): pass\ndef test_one(): assert 0")
    assert "console of" not in result.stdout.str()


@pytest.mark.parametrize("arguments", [[], ["-n2"]], ids=" ".join)
def test_the_summary_counts_boots_and_reuses_and_tells_what_was_kept(
    fake_suite: Suite, own_state: Path, arguments: list[str]
) -> None:
    result = fake_suite(
        """
        import pytest

        @pytest.mark.smolvm(scope="module")
        @pytest.mark.xdist_group("one")
        class TestShared:
            def test_a(self, smolvm): pass
            def test_b(self, smolvm): pass
            def test_c(self, smolvm): pass

        def test_one(smolvm): pass
        def test_bad(smolvm, smolvm_factory):
            smolvm_factory()
            assert 0
        """,
        *arguments,
        *(["--dist=loadgroup"] if arguments else []),
    )
    ids = sorted(entry.vm_id for entry in entries(own_state))
    assert len(ids) == 2
    result.stdout.fnmatch_lines(["*= smolvm =*", "VMs: 4 booted, 0 restored, 2 reused"])
    text = result.stdout.str()
    for vm_id in ids:
        assert re.search(rf"^kept: {vm_id}, .*::test_bad: the test failed$", text, re.MULTILINE)
        assert f"      pytest-smolvm --state-dir {own_state} ssh {vm_id}\n" in text
    assert text.index("VMs: 4 booted") > text.index("test_bad")


def test_a_summary_of_many_kept_vms_stays_short(fake_suite: Suite) -> None:
    source = "\n".join(f"def test_{number}(smolvm): assert 0" for number in range(15))
    result = fake_suite(source, "--tb=no")
    assert len(re.findall("^kept: ", result.stdout.str(), re.MULTILINE)) == 10
    result.stdout.fnmatch_lines(["and 5 more: pytest-smolvm *ps"])


@pytest.mark.parametrize(
    ("durations", "title", "shown"),
    [
        ("2", "*slowest 2 VM starts*", 2),
        ("0", "*slowest VM starts*", 3),
        ("10", "*10 VM starts*", 3),
    ],
)
@pytest.mark.parametrize("arguments", [[], ["-n2"]], ids=" ".join)
def test_durations_shows_the_slowest_boots(
    fake_suite: Suite, durations: str, title: str, shown: int, arguments: list[str]
) -> None:
    source = "".join(ONE.replace("one", str(number)) for number in range(3))
    result = fake_suite(source, f"--durations={durations}", *arguments)
    result.stdout.fnmatch_lines([title, "*s boot     vm-* for *::test_*"])
    found = re.findall(r"^([\d.]+)s boot", result.stdout.str(), re.MULTILINE)
    assert len(found) == shown
    assert found == sorted(found, key=float, reverse=True)


def test_no_boots_are_listed_without_durations_or_below_their_minimum(fake_suite: Suite) -> None:
    assert "slowest" not in fake_suite(ONE).stdout.str()
    assert "VM starts" not in fake_suite(ONE, "--durations=3", "--durations-min=9").stdout.str()


@pytest.mark.parametrize("arguments", [[], ["-n1"]], ids=" ".join)
def test_junit_xml_has_id_backend_and_boot_time(
    fake_suite: Suite, pytester: pytest.Pytester, arguments: list[str]
) -> None:
    fake_suite(ONE + "def test_without(): pass\n", "--junitxml=out.xml", *arguments)
    cases = {
        case.get("name"): {entry.get("name"): entry.get("value") for entry in case.iter("property")}
        for case in ElementTree.parse(pytester.path / "out.xml").iter("testcase")
    }
    found = cases["test_one"]
    assert re.fullmatch(r"vm-\w{8}", found.pop("smolvm_vm_id") or "")
    assert re.fullmatch(r"\d+\.\d{3}", found.pop("smolvm_boot_time_s") or "")
    assert found == {"smolvm_backend": "fake (none)"}
    assert cases["test_without"] == {}


def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_BOOT_S", "2.5")


def test_v_tells_of_a_boot_that_takes_longer_than_two_seconds(
    fake_suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch)
    result = fake_suite(ONE, "-v")
    result.stdout.fnmatch_lines(["smolvm: vm-* is booting for *::test_one [[]2 s]"])
    assert "is booting" not in fake_suite(ONE).stdout.str()


def test_a_worker_tells_of_its_slow_boots_too(
    fake_suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch)
    result = fake_suite(ONE, "-v", "-n1")
    result.assert_outcomes(passed=1)
    result.stderr.fnmatch_lines(["*gw0* smolvm: vm-* is booting for *::test_one [[]2 s]"])


def test_v_is_silent_on_quick_boots(fake_suite: Suite) -> None:
    assert "is booting" not in fake_suite(ONE, "-v").stdout.str()


def test_our_own_error_is_shown_at_the_line_of_the_test(fake_suite: Suite) -> None:
    result = fake_suite("def test_one(smolvm):\n    smolvm.run('fail', check=True)\n")
    result.stdout.fnmatch_lines(
        [">*smolvm.run('fail', check=True)", "E *ended with exit status 1*"]
    )
    assert "guest.py" not in result.stdout.str()
    assert "guest.py" in fake_suite("", "--full-trace").stdout.str()


def test_a_vm_that_cannot_be_ended_at_the_runs_end_is_told_of(fake_suite: Suite) -> None:
    result = fake_suite(
        """
        def test_one(smolvm):
            def refuse(): raise OSError("the disk is gone")
            smolvm._directory.destroy = refuse
            raise KeyboardInterrupt
        """,
        "--smolvm-retain=none",
    )
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*= smolvm =*", "a VM could not be ended: the disk is gone"])


def test_the_short_summary_has_one_line_of_our_errors_in_ci_too(
    fake_suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    result = fake_suite(
        """
        import pytest
        @pytest.mark.smolvm(boot_args="no-boot init=/init")
        def test_one(smolvm): pass
        def test_two(smolvm): smolvm.run(["fail", "a" * 100], check=True)
        """
    )
    summary = result.stdout.str().partition("short test summary info")[2].splitlines()[1:]
    assert len(summary) == 3, summary
    assert re.match("FAILED .*::test_two - .*CommandFailedError: .* exit status 1", summary[0])
    assert re.match("ERROR .*::test_one - .*BackendError: .* died while booting", summary[1])
