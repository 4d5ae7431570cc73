"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(given: str | Path) -> Path:
    """``~`` and ``~user`` are homes; one of a user that is not there stays as it is written."""
    return Path(os.path.expanduser(given))  # noqa: PTH111 - Path.expanduser raises RuntimeError


def is_file(path: Path) -> bool:
    """Whether there is a file; a name that cannot be one (too long, with a NUL) is none."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises


def exists(path: Path) -> bool:
    """Whether there is anything; see ``is_file``."""
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises
