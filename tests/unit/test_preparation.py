"""Names for what prepares a VM: equal for equal work, and for nothing else."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_smolvm.plugin.preparation import preparation_of
from pytest_smolvm.plugin.wanted import Wanted

GREETING = "hello"
OBJECT = object()


def key(how: Any, prepare_key: str = "") -> str:
    preparation, problem = preparation_of(Wanted(prepare=how, prepare_key=prepare_key))
    assert preparation is not None
    assert not problem
    return preparation.key


def install(vm: Any) -> None:
    vm.run(f"echo {GREETING}")
    helper(vm)


def helper(vm: Any) -> None:
    vm.run("true")


def with_closure(package: Any) -> Callable[[Any], None]:
    def prepare(vm: Any) -> None:
        vm.run(f"install {package}")

    return prepare


def test_without_a_preparation_there_is_none() -> None:
    assert preparation_of(Wanted()) == (None, "")


def test_the_values_of_a_closure_are_part_of_the_name() -> None:
    assert key(with_closure("nginx")) == key(with_closure("nginx"))
    assert key(with_closure("nginx")) != key(with_closure("apache"))
    mixed = {"a": [1, 2.5, None, True], "b": (Path("/x"), b"y", frozenset({"z"}))}
    assert key(with_closure(mixed)) == key(with_closure(dict(reversed(mixed.items()))))


def test_a_constant_of_the_module_is_part_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(install)
    monkeypatch.setattr(sys.modules[__name__], "GREETING", "goodbye")
    assert key(install) != before


@pytest.mark.parametrize(
    ("constant", "changed"),
    [({"a": 1}, {"a": 2}), (["nginx"], ["nginx", "curl"]), ({"x"}, {"y"}), (b"1", b"2")],
)
def test_so_are_constants_that_hold_others(
    monkeypatch: pytest.MonkeyPatch, constant: object, changed: object
) -> None:
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "GREETING", constant)
    before = key(install)
    monkeypatch.setattr(module, "GREETING", changed)
    assert key(install) != before
    monkeypatch.setattr(module, "GREETING", constant)
    assert key(install) == before


def test_a_function_of_the_module_is_part_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(vm: Any) -> None:
        vm.run("false")

    before = key(install)
    monkeypatch.setattr(sys.modules[__name__], "helper", other)
    assert key(install) != before


def test_arguments_given_beforehand_are_part_of_the_name() -> None:
    one, two = (functools.partial(install, version=number) for number in (1, 2))
    assert key(one) != key(two)
    assert key(one) == key(functools.partial(install, version=1))


def test_a_list_of_commands_is_its_own_name() -> None:
    assert key(["a", "b"]) == key(("a", "b"))
    assert len({key(["a", "b"]), key(["b", "a"]), key(["ab"])}) == 3


def test_an_explicit_key_is_all_that_counts() -> None:
    assert key(install, "v1") == key(helper, "v1")
    assert key(install, "v1") != key(install, "v2")
    assert key(with_closure(OBJECT), "v1") == key(install, "v1")


def test_a_value_that_has_no_name_is_told_and_makes_no_name() -> None:
    preparation, problem = preparation_of(Wanted(prepare=with_closure(OBJECT)))
    assert preparation is not None
    assert preparation.key == ""
    assert "of the type object" in problem


def test_a_function_that_names_itself_comes_to_an_end() -> None:
    def again(vm: Any) -> None:
        again(vm)

    assert key(again)


def test_names_are_the_same_in_another_process() -> None:
    script = (
        "from tests.unit.test_preparation import key, install, with_closure\n"
        "print(key(install), key(with_closure({'a', 'b', 'c'})))"
    )
    root = Path(__file__).parents[2]
    told = {
        subprocess.check_output(
            [sys.executable, "-c", script], cwd=root, text=True, env={"PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    }
    assert told == {f"{key(install)} {key(with_closure({'a', 'b', 'c'}))}\n"}
