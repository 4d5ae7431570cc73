"""The program that waits in a guest for its restore: see ``agent.c``."""

from __future__ import annotations

from pathlib import Path

from pytest_smolvm.errors import ImageError
from pytest_smolvm.limits import host_architecture


def binary(architecture: str | None = None) -> bytes:
    """The agent for guests of an architecture (default: this host's), a static ELF file."""
    name = architecture or host_architecture()
    path = Path(__file__).with_name(f"agent-{name}")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"there is no agent for guests of the kind {name!r}") from None
