"""The environment file: whatever goes in comes out."""

from __future__ import annotations

import subprocess

import pytest

from pytest_smolvm.envvars import parse, render

VALUES = [
    "",
    "plain",
    "two words",
    "it's",
    "'",
    "''",
    '"double"',
    "$HOME ${HOME} $(id) `id`",
    "back\\slash\\",
    "line\nline\n\nline",
    "\nexport OTHER='x'\n",
    "tab\tand\rreturn",
    "ünïcödé 漢字 🚀",
    "-n",
    "!history #comment ; & | > < * ? [a] ~",
    "x" * 100_000,
    "'\n" * 1000,
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_any_value_survives_the_file(value: str) -> None:
    variables = {"A": "first", "KEY": value, "Z": "last"}
    assert parse(render(variables)) == variables


@pytest.mark.parametrize("value", [v for v in VALUES if len(v) < 10_000])
def test_a_shell_reads_the_same_value(value: str) -> None:
    script = render({"KEY": value}) + 'printf "%s|" "$KEY"'
    done = subprocess.run(["/bin/sh"], input=script.encode(), capture_output=True, check=True)
    assert done.stdout.decode() == value + "|"
    assert done.stderr == b""


def test_lines_that_are_not_ours_are_passed_over() -> None:
    assert parse("# comment\nfoo=bar\nexport A=1\nexport 9=x\nexport B='x\n") == {"A": "1"}
    assert parse("") == {}
