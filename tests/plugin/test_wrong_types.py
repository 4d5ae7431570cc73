"""Every argument of the marker and every ini option, each with values of every wrong type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_smolvm.plugin.options import MARKER_ARGUMENTS, OPTIONS
from pytest_smolvm.plugin.settings import settings_of

VALUES = (
    "None, True, 0, -1, 1.5, float('nan'), 10**400, '', 'x\\0', 'x' * 10_000, b'x', [], [None], "
    "{}, {1: 2}, {'A': None}, set(), object(), object, print, ..."
)


def test_a_marker_of_any_type_is_taken_or_explained(
    fake_suite: Callable[..., pytest.RunResult], own_state: Path
) -> None:
    """In a run with hundreds of them, in which nothing is left and nothing of ours is shown."""
    result = fake_suite(
        f"""
        import pytest

        VALUES = [{VALUES}]

        @pytest.mark.parametrize("key, number", [
            pytest.param(key, number, marks=pytest.mark.smolvm(**{{key: VALUES[number]}}))
            for key in {MARKER_ARGUMENTS!r}
            for number in range(len(VALUES))
        ])
        def test_one(smolvm_config, key, number):
            print("taken", key, number)
        """,
        "-q",
        "--tb=native",
    )
    outcomes = result.parseoutcomes()
    assert set(outcomes) == {"passed", "errors"}, outcomes
    assert sum(outcomes.values()) == len(MARKER_ARGUMENTS) * len(eval(f"[{VALUES}]"))  # noqa: S307
    assert outcomes["errors"] > outcomes["passed"]
    text = result.stdout.str()
    assert "INTERNALERROR" not in text
    assert "Traceback" not in text, text[text.index("Traceback") :][:3000]
    assert not list((own_state / "vms").glob("*"))


TOML = ("1", "-1", "1.5", "nan", "true", '""', '"\\u0000"', "[]", "[1]", "{a = 1}", "2020-01-01")


@pytest.mark.filterwarnings("ignore:Passing a value that is not a string")
@pytest.mark.parametrize("ini", [option.ini for option in OPTIONS if option.ini])
def test_an_ini_value_of_any_type_is_taken_or_a_usage_error(
    pytester: pytest.Pytester, ini: str
) -> None:
    """As TOML has types: what pytest has to say of them names the option, too."""
    refused = 0
    for table in ("tool.pytest", "tool.pytest.ini_options"):
        for value in TOML:
            pytester.makepyprojecttoml(f"[{table}]\n{ini} = {value}")
            try:
                settings_of(pytester.parseconfig())
            except pytest.UsageError as error:
                refused += 1
                assert ini in str(error)
    assert refused > len(TOML) / 2
