"""Our own errors, shown at the line of the test that met them."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import _pytest
import pluggy
import pytest

from pytest_smolvm.errors import SmolVMError

_PACKAGE = Path(__file__).parents[1]
_PYTEST = [Path(module.__file__).parent for module in (_pytest, pluggy) if module.__file__]


def cut(call: pytest.CallInfo[None], config: pytest.Config) -> bool:
    """Cut the traceback of an error of ours where we were called.

    True: no line of the user's has called us, so that the error alone is to be
    shown. ``--full-trace`` leaves everything as it is.
    """
    error = call.excinfo
    if error is None or not error.errisinstance(SmolVMError) or config.getoption("fulltrace"):
        return False
    return not _end_where_we_were_called(error)


def shorten_summary(call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    """Have the run's short summary show one line of an error of ours, whose text may have many.

    Where pytest believes to run in CI, it would repeat all of them there, a
    machine's console included.
    """
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None and call.excinfo is not None and call.excinfo.errisinstance(SmolVMError):
        crash.message = crash.message.partition("\n")[0]


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
