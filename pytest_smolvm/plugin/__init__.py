"""The pytest plugin: hooks and fixtures, and nothing that a suite without VMs would pay for.

Nothing here imports the library itself at load: pydantic and paramiko are
loaded by the first test that asks for a VM.
"""

from __future__ import annotations

import pytest

from pytest_smolvm.plugin import hookspecs
from pytest_smolvm.plugin.fixtures import (
    smolvm,
    smolvm_config,
    smolvm_factory,
    smolvm_images,
    smolvm_session,
)

__all__ = [
    "smolvm",
    "smolvm_config",
    "smolvm_factory",
    "smolvm_images",
    "smolvm_session",
]

pytest_plugins = [
    f"pytest_smolvm.plugin.{part}"
    for part in ("options", "settings", "hooks", "summary", "debugging", "distribution")
]


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(hookspecs)
