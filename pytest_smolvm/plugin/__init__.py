"""The pytest plugin: hooks and fixtures, and nothing that a suite without VMs would pay for.

Nothing here imports the library itself at load: pydantic and paramiko are
loaded by the first test that asks for a VM.
"""

from __future__ import annotations

import pytest

from pytest_smolvm.plugin import (
    debugging,
    distribution,
    grouping,
    hooks,
    hookspecs,
    options,
    settings,
    summary,
)
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

# Not named in pytest_plugins: pytest 8.0 warns of those that are loaded already.
_PARTS = (options, settings, hooks, summary, debugging, distribution, grouping)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(hookspecs)
    for part in _PARTS:
        pluginmanager.register(part, f"smolvm-{part.__name__.rpartition('.')[2]}")
