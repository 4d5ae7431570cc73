"""What happened to VMs, told by whoever runs tests to whoever shows the summary.

Events travel on test reports, as plain data: xdist carries them from its
workers to the controller, and a worker that crashes loses none that it sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypedDict

import pytest

ATTRIBUTE = "smolvm_events"


class Event(TypedDict, total=False):
    """One thing that happened. ``seconds`` is how long a VM's start took."""

    kind: Literal["header", "started", "reused", "replaced", "retained", "template", "trouble"]
    text: str
    vm_id: str
    test: str
    seconds: float
    restored: bool
    templates_made: int
    reason: str
    directory: str
    state_dir: str
    host: str


def attach(report: pytest.TestReport, events: list[Event]) -> None:
    """Send ``events`` along with the report."""
    if events:
        setattr(report, ATTRIBUTE, [*attached(report), *events])


def attached(report: pytest.TestReport) -> Iterable[Event]:
    """The events that came with a report."""
    events: list[Event] = getattr(report, ATTRIBUTE, [])
    return events
