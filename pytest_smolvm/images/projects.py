"""Where a project tells of images of its own; read without what it takes to check them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pytest_smolvm.errors import ImageError

PYPROJECT = "pyproject.toml"


def find_project(start: Path) -> Path | None:
    """The ``pyproject.toml`` of the project that the folder ``start`` lies in, if there is one."""
    for folder in (start, *start.parents):
        if (folder / PYPROJECT).is_file():
            return folder / PYPROJECT
    return None


def recipe_tables(source: Path) -> dict[str, Any]:
    """The tables ``[tool.smolvm.images.NAME]``, by name. Raises ``ImageError``."""
    try:
        found: Any = tomllib.loads(source.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ImageError(f"{source} cannot be read: {error}") from error
    for key in ("tool", "smolvm", "images"):
        found = found.get(key, {}) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise ImageError(f"{source}: tool.smolvm.images must be a table of tables, one per image")
    return found
