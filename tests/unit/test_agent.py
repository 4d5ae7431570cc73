"""The guest's agent: the binary in the package is that of the source beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pytest_smolvm import ImageError
from pytest_smolvm.images import agent

FOLDER = Path(agent.__file__).parent


def test_the_binary_was_built_from_this_source() -> None:
    built_from = (FOLDER / "source.sha256").read_text().strip()
    source = hashlib.sha256((FOLDER / "agent.c").read_bytes()).hexdigest()
    assert source == built_from, "agent.c was changed: run script/agent"


def test_the_binary_needs_nothing_of_the_guest() -> None:
    data = agent.binary("x86_64")
    assert data.startswith(b"\x7fELF\x02\x01")
    # No interpreter, no shared library: it runs with any C library, or none.
    assert b"ld-linux" not in data
    assert len(data) < 8192


def test_an_architecture_without_an_agent_is_an_error_that_names_it() -> None:
    with pytest.raises(ImageError, match="riscv64"):
        agent.binary("riscv64")
