"""What the terminal says of a run's VMs: one line at its head, a section at its end."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pytest_smolvm.plugin import events
from pytest_smolvm.plugin.events import Event
from pytest_smolvm.plugin.progress import verbosity_of

_KEPT_SHOWN = 10
# The options with which pytest collects tests and runs none.
_LOOKING = ("collectonly", "setupplan", "showfixtures", "show_fixtures_per_test")
_summary_key = pytest.StashKey["Summary"]()


class Summary:
    """Gathers events, from reports and from workers' ends; registered where the terminal is."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._events: list[Event] = []
        self._header = ""

    def take(self, told: Iterable[Event]) -> None:
        """Take note of what happened."""
        for event in told:
            self._events.append(event)
            if event["kind"] == "header" and not self._header:
                self._show_header(event["text"])

    def show_header_of(self, items: list[pytest.Item]) -> str:
        """The line above a run with VMs in it; empty for one without."""
        quiet = verbosity_of(self._config) < 0
        if quiet or not any(_wants_vm(item) for item in items):
            return ""
        from pytest_smolvm.plugin.header import describe_host
        from pytest_smolvm.plugin.settings import settings_of

        self._header = describe_host(settings_of(self._config))
        return f"smolvm: {self._header}"

    def _show_header(self, text: str) -> None:
        self._header = text
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and verbosity_of(self._config) >= 0:
            reporter.ensure_newline()
            reporter.write_line(f"smolvm: {text}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.take(events.attached(report))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker of xdist has ended, well or not."""
        output = getattr(node, "workeroutput", None) or {}
        self.take(output.get(events.ATTRIBUTE, ()))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        self._show_slowest(terminalreporter)
        kept = [event for event in self._of("retained") if _is_there(event)]
        trouble = self._of("trouble")
        quiet = verbosity_of(self._config) < 0
        if not (kept or trouble or (self._events and not quiet)):
            return
        started, reused = self._of("started"), len(self._of("reused"))
        replaced = len(self._of("replaced"))
        if not (kept or trouble or started or reused or replaced):
            return
        terminalreporter.section("smolvm")
        restored = sum(event["restored"] for event in started)
        made = sum(event["templates_made"] for event in started)
        terminalreporter.write_line(
            f"VMs: {len(started) - restored} booted, {restored} restored, {reused} reused"
            + (f", {replaced} replaced" if replaced else "")
            + (f"; {made} template{'s' if made > 1 else ''} made" if made else "")
        )
        for text in dict.fromkeys(event["text"] for event in self._of("template")):
            terminalreporter.write_line(text, yellow=True)
        for event in self._of("replaced"):
            terminalreporter.write_line(
                f"replaced: {event['vm_id']} {event['reason']}, before {event['test']}"
            )
        for event in kept[:_KEPT_SHOWN]:
            terminalreporter.write_line(
                f"kept: {event['vm_id']}, {event['test']}: {event['reason']}\n"
                f"      {_way_in(event)}"
            )
        if len(kept) > _KEPT_SHOWN:
            terminalreporter.write_line(
                f"and {len(kept) - _KEPT_SHOWN} more: {_command(kept[0], 'ps')}"
            )
        for event in trouble:
            terminalreporter.write_line(event["text"], red=True)

    def _show_slowest(self, terminalreporter: pytest.TerminalReporter) -> None:
        shown = self._config.getoption("durations", None)
        at_least_s = self._config.getoption("durations_min", None) or 0.0
        boots = [event for event in self._of("started") if event["seconds"] >= at_least_s]
        boots.sort(key=lambda event: -event["seconds"])
        if shown is None or not boots:
            return
        count = len(boots) if shown == 0 else shown
        title = "slowest VM starts" if shown == 0 else f"slowest {shown} VM starts"
        terminalreporter.section(title)
        for event in boots[:count]:
            terminalreporter.write_line(
                f"{event['seconds']:.2f}s {'restore' if event['restored'] else 'boot':8} "
                f"{event['vm_id']} for {event['test']}"
            )

    def _of(self, kind: str) -> list[Event]:
        return [event for event in self._events if event["kind"] == kind]


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        summary = config.stash[_summary_key] = Summary(config)
        config.pluginmanager.register(summary, "smolvm-events")


def summary_of(config: pytest.Config) -> Summary | None:
    """What gathers the events of this run; None in a worker of xdist."""
    return config.stash.get(_summary_key, None)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str:
    summary = summary_of(config)
    looks_only = any(getattr(config.option, name, False) for name in _LOOKING)
    return "" if summary is None or looks_only else summary.show_header_of(items)


def _wants_vm(item: pytest.Item) -> bool:
    names = getattr(item, "fixturenames", ())
    wanted = any(name in ("smolvm", "smolvm_session", "smolvm_factory") for name in names)
    return wanted and item.get_closest_marker("skip") is None


def wants_vm_of_its_own(item: pytest.Item) -> bool:
    """Whether the test takes the fixture ``smolvm``, as far as is known before it runs."""
    return "smolvm" in getattr(item, "fixturenames", ()) and _wants_vm(item)


def _is_there(event: Event) -> bool:
    # Later failures may have taken its place; of another host nothing is known.
    return event.get("host") != platform.node() or Path(event["directory"]).is_dir()


def _way_in(event: Event) -> str:
    line = _command(event, "ssh", event["vm_id"])
    elsewhere = event.get("host") not in ("", None, platform.node())
    return f"on {event['host']}: {line}" if elsewhere else line


def _command(event: Event, *words: str) -> str:
    from pytest_smolvm.keepsake import command_line

    return command_line(Path(event["state_dir"]), *words)
