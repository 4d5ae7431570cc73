"""The hooks that this plugin calls, for conftest.py and other plugins to fill in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_smolvm import SmolVM, VMConfig


@pytest.hookspec(firstresult=True)
def pytest_smolvm_config(item: pytest.Item | pytest.Session, config: VMConfig) -> VMConfig | None:
    """Change the VMConfig that a test's VM is about to get; the first one returned is taken.

    ``item`` is the test, or the session for ``smolvm_session``. Return None to
    leave ``config`` as it is.
    """


def pytest_smolvm_started(item: pytest.Item | pytest.Session, vm: SmolVM) -> None:
    """A VM has been booted for ``item``, which has not seen it yet."""


def pytest_smolvm_failed(item: pytest.Item, vm: SmolVM, report: pytest.TestReport) -> None:
    """A phase of a test that has ``vm`` failed; the VM is still as the failure left it.

    Called for every VM of the test, and every failing phase: set-up, call,
    teardown. Sections that are added to ``report`` are shown with the failure.
    """
