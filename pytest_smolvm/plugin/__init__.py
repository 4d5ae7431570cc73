"""The pytest plugin: hooks and fixtures, and nothing that a suite without VMs would pay for.

Nothing here imports the library itself at load: pydantic and paramiko are
loaded by the first test that asks for a VM.
"""

from __future__ import annotations

from pytest_smolvm.plugin.fixtures import (
    smolvm,
    smolvm_config,
    smolvm_factory,
    smolvm_images,
)
from pytest_smolvm.plugin.options import pytest_addoption, pytest_configure
from pytest_smolvm.plugin.reporting import pytest_runtest_makereport

__all__ = [
    "pytest_addoption",
    "pytest_configure",
    "pytest_runtest_makereport",
    "smolvm",
    "smolvm_config",
    "smolvm_factory",
    "smolvm_images",
]
