"""What the run shows: progress while an image is made, the console when a test fails."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import _pytest
import pluggy
import pytest

from pytest_smolvm.errors import SmolVMError

if TYPE_CHECKING:
    from pytest_smolvm.vm import SmolVM

_PACKAGE = Path(__file__).parents[1]
_PYTEST = [Path(module.__file__).parent for module in (_pytest, pluggy) if module.__file__]
_vms_key = pytest.StashKey[list["SmolVM"]]()


def remember_vm(item: pytest.Item, vm: SmolVM) -> None:
    """Note that the test used this VM, for its report."""
    item.stash.setdefault(_vms_key, []).append(vm)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    own_error = call.excinfo
    if own_error is not None and (
        not own_error.errisinstance(SmolVMError) or item.config.getoption("fulltrace")
    ):
        own_error = None
    has_line = own_error is None or _end_where_we_were_called(own_error)
    report = yield
    if own_error is not None and not has_line and report.failed:
        report.longrepr = own_error.getrepr(style="value", chain=False)
    vms = item.stash.get(_vms_key, [])
    if report.failed and vms:
        from pytest_smolvm.diagnosis import last_lines

        for vm in vms:
            text = last_lines(vm.console)
            title = f"console of {vm.vm_id} (last {len(text.splitlines())} lines)"
            report.sections.append((title, text or "(nothing)"))
    return report


def _end_where_we_were_called(excinfo: pytest.ExceptionInfo[BaseException]) -> bool:
    """Cut the traceback off at the line of the user's that called us; False if none did."""
    caller = excinfo.tb
    while (called := caller.tb_next) is not None:
        if _lies_in(called, _PACKAGE):
            if any(_lies_in(caller, package) for package in _PYTEST):
                return False
            caller.tb_next = None
            return True
        caller = called
    return True


def _lies_in(frame: TracebackType, folder: Path) -> bool:
    return folder in Path(frame.tb_frame.f_code.co_filename).parents


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
