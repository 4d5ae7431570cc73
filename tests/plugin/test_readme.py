"""What the README says is true: its examples run, its table is whole, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_smolvm import VMConfig
from pytest_smolvm.plugin.options import MARKER_ONLY, OPTIONS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]


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
    assert result.stdout.startswith("Linux micro ")


def test_its_table_has_every_option() -> None:
    rows = {}
    for line in README.splitlines():
        cells = [re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0]:
            rows[cells[0][0]] = ["".join(cell[:1]) for cell in cells[1:3]]
    expected = {name: ["", ""] for name in [*VMConfig.model_fields, *MARKER_ONLY]}
    expected |= {option.field: [option.flag or "", option.ini] for option in OPTIONS}
    assert rows == expected


def test_its_host_packages_are_those_of_the_scripts() -> None:
    (line,) = re.findall(r"apt-get install --no-install-recommends (.*)", README)
    setup = (ROOT / "script/setup.sh").read_text()
    required = set(re.findall(r"require \S+ ([\w-]+)", setup)) - {"qemu-system-arm", "PACKAGE"}
    assert set(line.split()) == required


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target
    for script in re.findall(r"^(script/\w+)", path.read_text(), re.MULTILINE):
        assert (ROOT / script).exists(), script


def test_the_table_of_modules_has_every_module() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    package = ROOT / "pytest_smolvm"
    for path in package.rglob("*.py"):
        if path.name != "__init__.py":
            assert f"`{path.stem}`" in text or f"/{path.stem}`" in text, path
