"""What the run shows: progress while an image is made, the console when a test fails."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_smolvm.vm import SmolVM

_vms_key = pytest.StashKey[list["SmolVM"]]()


def remember_vm(item: pytest.Item, vm: SmolVM) -> None:
    """Note that the test used this VM, for its report."""
    item.stash.setdefault(_vms_key, []).append(vm)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    vms = item.stash.get(_vms_key, [])
    if report.failed and vms:
        from pytest_smolvm.diagnosis import last_lines

        for vm in vms:
            text = last_lines(vm.console)
            title = f"console of {vm.vm_id} (last {len(text.splitlines())} lines)"
            report.sections.append((title, text or "(nothing)"))
    return report


def show_progress(config: pytest.Config, line: str) -> None:
    """Show a line at once, though pytest captures what tests print."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return  # an xdist worker has no terminal of its own
    capture = config.pluginmanager.get_plugin("capturemanager")
    if capture is None:
        reporter.write_line(f"smolvm: {line}")
        return
    with capture.global_and_fixture_disabled():
        reporter.ensure_newline()
        reporter.write_line(f"smolvm: {line}")
