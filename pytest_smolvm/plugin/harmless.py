"""Reports of tests in which guests' output may be, made harmless for terminals and files."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_smolvm.terminal import harmless, harmless_but_coloured


def make_harmless(report: pytest.TestReport) -> None:
    """Take out of a report what could drive the terminal of whoever reads it.

    A test may have printed what its guest printed, or compared it: then it is in what pytest
    captured, and in the lines of the failure. JUnit's XML and other reports are made of these,
    too. Colours of captured output stay.
    """
    report.sections[:] = [(title, harmless_but_coloured(text)) for title, text in report.sections]
    failure: Any = report.longrepr
    if isinstance(failure, str):
        report.longrepr = harmless(failure)
        return
    for traceback, crash, _ in getattr(failure, "chain", ()) or [
        (getattr(failure, "reprtraceback", None), getattr(failure, "reprcrash", None), None)
    ]:
        for entry in getattr(traceback, "reprentries", ()):
            entry.lines[:] = [harmless(line) for line in entry.lines]
        if crash is not None:
            crash.message = harmless(crash.message)
