"""What the README says is true: its examples run, its packages are the right ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_its_tests_pass_in_real_guests(pytester: pytest.Pytester) -> None:
    tests = [text for text in blocks("python") if "def test_" in text]
    for number, text in enumerate(tests):
        pytester.makepyfile(**{f"test_{number}": text})
    result = pytester.runpytest_subprocess("-s", "--strict-markers")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["*ssh -o UserKnownHostsFile=*-p * root@127.0.0.1"])


def test_its_program_runs_without_pytest() -> None:
    (program,) = [text for text in blocks("python") if "def test_" not in text]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert result.stdout.startswith("Linux vm-")


def test_its_host_packages_are_those_of_the_scripts() -> None:
    (line,) = re.findall(r"apt-get install --no-install-recommends (.*)", README)
    setup = (ROOT / "script/setup.sh").read_text()  # script/test needs more
    required = set(re.findall(r"require \S+ ([\w-]+)", setup)) - {"qemu-system-arm", "PACKAGE"}
    assert set(line.split()) == required
