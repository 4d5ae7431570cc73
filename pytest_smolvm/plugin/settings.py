"""What command line and ini say, checked before any test runs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pytest_smolvm.errors import ImageError
from pytest_smolvm.images.projects import find_project, recipe_tables
from pytest_smolvm.limits import DEFAULT_IMAGE, IMAGES
from pytest_smolvm.paths import expanded, is_file
from pytest_smolvm.plugin.options import OPTIONS, Option

_MARKER_LINE = (
    "smolvm(**kwargs): change the VM that the test gets: any field of VMConfig "
    "(vcpu_count, mem_size_mib, env_vars, ...), image, arch, scope, retain, restore, prepare, "
    "prepare_key, boot_timeout"
)


@dataclass(frozen=True)
class Settings:
    """The options of this run, defaults filled in."""

    config_fields: dict[str, Any] = field(default_factory=dict)
    """The fields of ``VMConfig`` that were given."""
    accel: str = "auto"
    image: str = DEFAULT_IMAGE
    scope: str = "function"
    retain: str = "failed"
    retention_count: int = 3
    retention_max_mib: int = 4096
    restore: bool = True
    prefetch: int = 1
    boot_timeout: float | None = None
    state_dir: Path | None = None


_settings_key = pytest.StashKey[Settings]()


def settings_of(config: pytest.Config) -> Settings:
    """The settings of this run; a value that cannot be right is a ``pytest.UsageError``."""
    settings = config.stash.get(_settings_key, None)
    if settings is None:
        settings = config.stash[_settings_key] = _read(config)
    return settings


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER_LINE)
    settings = settings_of(config)
    if settings.state_dir is not None:
        _point_to(settings.state_dir, config)


def is_remote_worker(config: pytest.Config) -> bool:
    """Whether this is an xdist worker that may be on another host than its controller."""
    given = getattr(config, "workerinput", {})
    return bool(given.get("smolvm", {}).get("remote"))


def _point_to(state_dir: Path, config: pytest.Config) -> None:
    # The library's own way of being told; xdist's workers on this host inherit it.
    before = os.environ.get("SMOLVM_STATE_DIR")
    os.environ["SMOLVM_STATE_DIR"] = str(state_dir)

    def restore() -> None:
        if before is None:
            os.environ.pop("SMOLVM_STATE_DIR", None)
        else:
            os.environ["SMOLVM_STATE_DIR"] = before

    config.add_cleanup(restore)


def _read(config: pytest.Config) -> Settings:
    fields: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for option in OPTIONS:
        source, value = _given(config, option)
        if value is None:
            continue
        (fields if option.is_config_field else others)[option.name] = _check(option, source, value)
        if option.name == "image" and value not in IMAGES:
            _check_image(config, source, value)
    return Settings(config_fields=fields, **others)


def _check(option: Option, source: str, value: Any) -> Any:
    if option.choices and value not in option.choices:
        raise pytest.UsageError(
            f"{source} = {value!r} is not valid: use one of {', '.join(option.choices)}"
        )
    try:
        converted = option.convert(value)
    except ValueError as error:
        raise pytest.UsageError(f"{source} = {value!r} is not valid: {error}") from None
    if option.convert is Path and option.is_config_field and not is_file(converted):
        raise pytest.UsageError(
            f"{source} = {str(value)!r} is not valid: there is no such file; give the path of one"
        )
    return converted


def _check_image(config: pytest.Config, source: str, name: str) -> None:
    project = find_project(config.rootpath)
    try:
        own = sorted(recipe_tables(project)) if project else []
    except ImageError as error:
        raise pytest.UsageError(error.message) from None
    if name not in own:
        raise pytest.UsageError(
            f"{source} = {name!r} is not valid: use one of {', '.join([*IMAGES, *own])}, or tell "
            f"of it in [tool.smolvm.images.{name}] of {project or 'a pyproject.toml'}"
        )


def _given(config: pytest.Config, option: Option) -> tuple[str, Any]:
    """Where the value comes from, in words, and the value; None: it was not given."""
    if option.flag:
        value = config.getoption(option.destination, None)
        # A path of the controller's host means nothing on a worker's.
        if value is not None and not (option.name == "state_dir" and is_remote_worker(config)):
            return option.flag, _path_from(config.invocation_params.dir, value, option)
    if option.ini is None:
        return option.name, None
    source = f"the ini option {option.ini}"
    try:
        value = config.getini(option.ini)
    except (TypeError, ValueError, pytest.UsageError) as error:
        raise pytest.UsageError(f"{source} is not valid: {error} ({option.help})") from None
    if value in (None, "", []):
        return source, None
    _check_type(option, source, value)
    base = config.inipath.parent if config.inipath else config.rootpath
    return source, _path_from(base, value, option)


def _check_type(option: Option, source: str, value: Any) -> None:
    """TOML's own types come as they are, with a mere warning of pytest's, if with that."""
    if option.ini_type == "string" and not isinstance(value, str):
        raise pytest.UsageError(f"{source} = {value!r} is not valid: give a text, in quotes")
    if option.ini_type == "linelist" and not all(isinstance(line, str) for line in value):
        raise pytest.UsageError(f"{source} = {value!r} is not valid: give a list of texts")


def _path_from(base: Path, value: Any, option: Option) -> Any:
    # A path on the command line is relative to where pytest was started, one in
    # an ini file to that file.
    return base / expanded(value) if option.convert is Path else value
