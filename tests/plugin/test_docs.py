"""What the documents say is true: examples run, tables are whole, links lead somewhere."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from pytest_smolvm import plugin
from pytest_smolvm.plugin import hookspecs
from pytest_smolvm.plugin.options import MARKER_ARGUMENTS, OPTIONS, Option

ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs/reference.md").read_text()
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]


def row_of(option: Option) -> str:
    """The line of the reference for an option."""
    marker = f"`{option.name}`" if option.in_marker else ""
    flag = option.flag or ""
    if option.choices:
        flag += "=" + "\\|".join(option.choices)
    elif option.metavar:
        flag += f"={option.metavar}"
    flag = f"`{flag}`" if option.flag else ""
    ini = f"`{option.ini}`" if option.ini else ""
    return f"| {marker} | {flag} | {ini} | {option.default} | {option.help} |"


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", REFERENCE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def defined_names(title: str) -> set[str]:
    """The names that a section of the reference explains: lines ``* `name...`: ...``."""
    return set(re.findall(r"^\* `(\w[\w-]*)", section(title), re.MULTILINE))


def test_the_reference_has_every_option_as_it_is() -> None:
    rows = [line for line in section("Options").splitlines() if line.startswith("|")][2:]
    assert rows == [row_of(option) for option in OPTIONS]


def test_the_reference_has_every_fixture_and_hook() -> None:
    assert defined_names("Fixtures") == set(plugin.__all__)
    hooks = {
        name: function
        for name, function in vars(hookspecs).items()
        if name.startswith("pytest_smolvm")
    }
    assert defined_names("Hooks") == set(hooks)
    for name, function in hooks.items():
        arguments = ", ".join(inspect.signature(function).parameters)
        assert f"`{name}({arguments})`" in section("Hooks")


def test_the_marker_line_names_its_arguments(pytester: pytest.Pytester) -> None:
    text = pytester.runpytest_subprocess("--markers").stdout.str()
    assert "@pytest.mark.smolvm(**kwargs)" in text
    for option in OPTIONS:
        if option.in_marker and not option.is_config_field:
            assert option.name in text
    assert "image" in MARKER_ARGUMENTS
    assert "accel" not in MARKER_ARGUMENTS


def test_the_help_shows_every_option_with_its_default(pytester: pytest.Pytester) -> None:
    text = " ".join(pytester.runpytest_subprocess("--help").stdout.str().split())
    for option in OPTIONS:
        for name in (option.flag, option.ini):
            assert name is None or name in text
        if option.flag and not option.switch_off:
            assert f"{option.help} (default: {option.default})" in text


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
