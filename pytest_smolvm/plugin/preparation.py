"""What ``prepare`` says is done in a VM, and a name for it: equal work has an equal name."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_smolvm.plugin.wanted import Prepare, Wanted
from pytest_smolvm.startup import Preparation
from pytest_smolvm.vm import SmolVM

_COMMAND_TIMEOUT_S = 600.0
_CONSTANTS = (bool, int, float, str, bytes, Path, list, tuple, dict, set, frozenset)


class _NoNameError(Exception):
    """Two of these values cannot be told apart in another run; the text says which."""


def preparation_of(wanted: Wanted) -> tuple[Preparation | None, str]:
    """What a VM is prepared by, and why that has no name; empty: it has one."""
    how = wanted.prepare
    if not callable(how) and not how:
        return None, ""
    problem = ""
    if wanted.prepare_key:
        key = _hash(["key", wanted.prepare_key])
    else:
        try:
            key = _hash(_describe(how, frozenset()) if callable(how) else ["run", *how])
        except _NoNameError as error:
            key, problem = "", str(error)
    return Preparation(key, functools.partial(prepare, how=how)), problem


def prepare(vm: SmolVM, how: Prepare) -> None:
    """Do in a VM what ``how`` says."""
    if callable(how):
        how(vm)
    else:
        for command in how:
            vm.run(command, timeout=_COMMAND_TIMEOUT_S, check=True)


def _hash(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _describe(value: Any, seen: frozenset[int]) -> Any:
    """A value as JSON that is the same in every run in which the value is."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (bytes, Path)):
        return [type(value).__name__, str(value)]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *(_describe(each, seen) for each in value)]
    if isinstance(value, (set, frozenset)):
        return ["set", *sorted(json.dumps(_describe(each, seen)) for each in value)]
    if isinstance(value, Mapping):
        pairs = [[_describe(key, seen), _describe(each, seen)] for key, each in value.items()]
        return ["mapping", *sorted(pairs, key=json.dumps)]
    if isinstance(value, functools.partial):
        parts = [value.func, list(value.args), value.keywords]
        return ["partial", *(_describe(part, seen) for part in parts)]
    if isinstance(value, types.FunctionType):
        return _describe_function(value, seen)
    if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
        return [type(value).__name__, getattr(value, "__module__", ""), value.__name__]
    raise _NoNameError(f"it uses {value!r:.100}, of the type {type(value).__name__}")


def _describe_function(function: types.FunctionType, seen: frozenset[int]) -> Any:
    if id(function) in seen:
        return ["again", function.__qualname__]
    seen |= {id(function)}
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        code = function.__code__
        source = repr((code.co_code, [each for each in code.co_consts if not _is_code(each)]))
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return [
        *("function", function.__module__, function.__qualname__, source),
        [_describe(each, seen) for each in (function.__defaults__, function.__kwdefaults__)],
        [[name, _describe_cell(cell, seen)] for name, cell in cells],
        _describe_globals(function, seen),
    ]


def _describe_cell(cell: types.CellType, seen: frozenset[int]) -> Any:
    try:
        return _describe(cell.cell_contents, seen)
    except ValueError:
        return ["empty"]


def _describe_globals(function: types.FunctionType, seen: frozenset[int]) -> list[Any]:
    """The module's own constants and functions that the function names; other things are not
    part of what it does."""
    found = []
    for name in sorted(set(function.__code__.co_names)):
        value = function.__globals__.get(name)
        own_function = (
            isinstance(value, types.FunctionType) and value.__module__ == function.__module__
        )
        if own_function or isinstance(value, _CONSTANTS):
            try:
                found.append([name, _describe(value, seen)])
            except _NoNameError:
                continue
    return found


def _is_code(value: object) -> bool:
    return isinstance(value, types.CodeType)
