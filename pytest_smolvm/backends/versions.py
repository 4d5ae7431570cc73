"""Which release of an emulator a program is: asked once, as long as the file stays the same."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path

from pytest_smolvm.process import ToolError, run_tool

logger = logging.getLogger(__name__)


def version_of(binary: str, pattern: str) -> str:
    """What ``--version`` says, by the first group of ``pattern``; empty: it cannot be had."""
    facts = Path(binary).stat()
    return _ask(binary, pattern, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.cache
def _ask(binary: str, pattern: str, *_facts: int) -> str:
    try:
        text = run_tool([binary, "--version"], timeout_s=10)
    except ToolError as error:
        logger.debug("%s", error)
        return ""
    found = re.search(pattern, text)
    return found[1] if found else ""
