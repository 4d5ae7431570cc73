"""What a test wants: its markers over the settings of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import pytest

from pytest_smolvm.limits import ARCHITECTURES
from pytest_smolvm.plugin.options import MARKER_ARGUMENTS, OPTIONS, POLICIES, SCOPES, seconds
from pytest_smolvm.plugin.settings import Settings

Prepare = Callable[[Any], object] | Sequence[str]


class WrongMarkerError(ValueError):
    """A ``smolvm`` marker, or what was given to ``smolvm_factory``, is not valid."""


@dataclass(frozen=True)
class Wanted:
    """One VM as it was asked for: by marker, command line, ini or default."""

    config_fields: dict[str, Any] = field(default_factory=dict)
    image: str = ""
    arch: str | None = None
    accel: str = "auto"
    scope: str = "function"
    retain: str = "failed"
    restore: bool = True
    prepare: Prepare = ()
    prepare_key: str = ""
    boot_timeout: float | None = None


def wanted_by(item: pytest.Item, settings: Settings) -> Wanted:
    """What the markers of ``item`` make of the settings. Raises ``WrongMarkerError``."""
    return apply(marker_arguments(item), from_settings(settings), "@pytest.mark.smolvm")


def from_settings(settings: Settings) -> Wanted:
    """What a test without any marker wants."""
    return Wanted(
        config_fields=dict(settings.config_fields),
        image=settings.image,
        accel=settings.accel,
        scope=settings.scope,
        retain=settings.retain,
        restore=settings.restore,
        boot_timeout=settings.boot_timeout,
    )


def marker_arguments(item: pytest.Item) -> dict[str, Any]:
    """The ``smolvm`` markers of an item, merged key by key, the nearest winning."""
    merged: dict[str, Any] = {}
    for marker in item.iter_markers("smolvm"):
        if marker.args:
            raise WrongMarkerError(
                f"@pytest.mark.smolvm takes keyword arguments only, not {marker.args!r}"
            )
        for key, value in marker.kwargs.items():
            merged.setdefault(key, value)
    return merged


def apply(arguments: Mapping[str, Any], wanted: Wanted, where: str) -> Wanted:
    """``wanted``, changed by ``arguments``; ``where`` they were given is for errors."""
    config_fields = dict(wanted.config_fields)
    changes: dict[str, Any] = {}
    config_names = {option.name for option in OPTIONS if option.is_config_field}
    for key, value in arguments.items():
        if key not in MARKER_ARGUMENTS:
            raise WrongMarkerError(
                f"{where} has no argument {key!r}: the valid ones are {', '.join(MARKER_ARGUMENTS)}"
            )
        if key in config_names:
            config_fields[key] = value
        else:
            problem = _problem_with(key, value)
            if problem:
                raise WrongMarkerError(f"{where}({key}={value!r}) is not valid: {problem}")
            changes[key] = value
    if "image" in arguments or "arch" in arguments:
        # The image of a marker that is nearer than the option that gave the paths.
        for name in ("kernel_path", "rootfs_path", "initrd_path"):
            if name not in arguments:
                config_fields.pop(name, None)
    values = {entry.name: getattr(wanted, entry.name) for entry in fields(wanted)}
    return Wanted(**{**values, **changes, "config_fields": config_fields})


def _problem_with(key: str, value: Any) -> str:
    """What is wrong with an argument that is no field of ``VMConfig``; empty: nothing."""
    if key in ("scope", "retain"):
        choices = SCOPES if key == "scope" else POLICIES
        return "" if value in choices else f"use one of {', '.join(choices)}"
    if key == "restore":
        return "" if isinstance(value, bool) else "give True or False"
    if key == "boot_timeout":
        try:
            seconds(value)
        except ValueError as error:
            return str(error)
    if key == "arch" and value not in ARCHITECTURES:
        return f"use one of {', '.join(ARCHITECTURES)}"
    if key == "image" and not isinstance(value, str):
        return "give the name of an image"
    if key == "prepare_key" and not (isinstance(value, str) and value):
        return "give a text that changes when what prepare does changes"
    if key == "prepare" and not callable(value):
        is_list = isinstance(value, (list, tuple)) and all(isinstance(line, str) for line in value)
        return "" if is_list else "give a function of the VM, or a list of commands"
    return ""
