"""The hooks of a test's run: what its VMs are told of it, and what its report tells of them."""

from __future__ import annotations

import traceback
from collections.abc import Generator

import pytest

from pytest_smolvm.plugin import events, outcomes, tracebacks
from pytest_smolvm.plugin.harmless import make_harmless
from pytest_smolvm.plugin.session import existing_fleet, fleet_of
from pytest_smolvm.plugin.settings import settings_of
from pytest_smolvm.plugin.summary import summary_of, wants_vm_of_its_own

_nextitem_key = pytest.StashKey[pytest.Item | None]()
_postponed_key = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    item.stash[_nextitem_key] = nextitem
    try:
        return (yield)
    finally:
        if item.stash.get(_postponed_key, False):
            # --pdb was in a teardown that failed: only now is nobody looking any more.
            del item.stash[_postponed_key]
            fleet = existing_fleet(item.config)
            if fleet is not None:
                fleet.note_trouble(_leave(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    outcomes.begin(item)
    fleet = existing_fleet(item.config)
    if fleet is not None and _uses_session_vm(item) and not fleet.session_vm_is_fit(item):
        _forget_session_fixture(item)
    try:
        return (yield)
    finally:
        _note_session_user(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    # Its set-up is done; from here on its time is the test's own.
    nextitem = item.stash.get(_nextitem_key, None)
    if nextitem is not None and settings_of(item.config).prefetch and _vm_comes_soon(nextitem):
        fleet_of(item.config).foresee(item, nextitem)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, None, None]:
    item.stash[_nextitem_key] = nextitem
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    _note_session_user(item)
    alone = tracebacks.cut(call, item.config)
    report = yield
    if alone and report.failed and call.excinfo is not None:
        report.longrepr = call.excinfo.getrepr(style="value", chain=False)
    if report.failed:
        tracebacks.shorten_summary(call, report)
    outcomes.note(item, report)
    fleet = existing_fleet(item.config)
    if fleet is None:
        return report
    if report.failed or report.when == "setup":
        report.sections.extend(("smolvm", text) for text in outcomes.notes_of(item))
    if report.failed:
        _describe_vms(item, report)
    if report.when == "teardown":
        if report.failed and item.config.getoption("usepdb", False):
            item.stash[_postponed_key] = True
        else:
            for error in _leave(item):
                _fail(report, f"a VM of this test could not be ended: {error}")
    make_harmless(report)
    events.attach(report, fleet.take_events())
    return report


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    # Within the terminal's own wrapper, which writes the summary, and around
    # pytest's teardown of what is left: see the order in pluggy's documentation.
    try:
        return (yield)
    finally:
        _end_session(session)


def _end_session(session: pytest.Session) -> None:
    fleet = existing_fleet(session.config)
    if fleet is None:
        return
    errors = fleet.end()
    fleet.note_trouble(errors)
    told = fleet.take_events()
    if errors and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[events.ATTRIBUTE] = told
    elif (summary := summary_of(session.config)) is not None:
        summary.take(told)


def _leave(item: pytest.Item) -> list[Exception]:
    fleet = existing_fleet(item.config)
    return [] if fleet is None else fleet.leave(item.stash.get(_nextitem_key, None))


def _vm_comes_soon(nextitem: pytest.Item) -> bool:
    """Whether there is anything to foresee; without loading the library for nothing."""
    return existing_fleet(nextitem.config) is not None or wants_vm_of_its_own(nextitem)


def _uses_session_vm(item: pytest.Item) -> bool:
    """Whether the test has ``smolvm_session``, perhaps by ``getfixturevalue`` only."""
    request = getattr(item, "_request", item)
    return "smolvm_session" in getattr(request, "fixturenames", ())


def _note_session_user(item: pytest.Item) -> None:
    fleet = existing_fleet(item.config)
    if fleet is not None and _uses_session_vm(item):
        fleet.note_session_user(item)


def _describe_vms(item: pytest.Item, report: pytest.TestReport) -> None:
    from pytest_smolvm.plugin.sections import sections_of

    fleet = existing_fleet(item.config)
    shown = report.longreprtext
    for vm in fleet.vms_of(item) if fleet is not None else ():
        report.sections.extend(sections_of(vm, shown))
        try:
            item.config.hook.pytest_smolvm_failed(item=item, vm=vm, report=report)
        except Exception:  # noqa: BLE001 - the test has failed already; this is shown with it
            report.sections.append(("a pytest_smolvm_failed hook failed", traceback.format_exc()))


def _fail(report: pytest.TestReport, text: str) -> None:
    if report.failed:
        report.sections.append(("smolvm", text))
    else:
        report.outcome = "failed"
        report.longrepr = text


def _forget_session_fixture(item: pytest.Item) -> None:
    """Have pytest set ``smolvm_session`` up anew, with all that was built upon it."""
    info = getattr(item, "_fixtureinfo", None)
    request = getattr(item, "_request", None)
    if info is None or request is None:
        return
    for definition in info.name2fixturedefs.get("smolvm_session", ()):
        definition.finish(request)
