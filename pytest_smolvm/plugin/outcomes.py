"""How tests ended, as far as it is known, and what that means for the VMs they had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pytest

_PHASES = {
    "setup": "its set-up failed",
    "call": "the test failed",
    "teardown": "its teardown failed",
}
_failures_key = pytest.StashKey[list[str]]()
_done_key = pytest.StashKey[bool]()
_notes_key = pytest.StashKey[list[str]]()


@dataclass(frozen=True)
class User:
    """A test (or the session, for ``smolvm_session``) that has a VM, and its policy."""

    node: pytest.Item | pytest.Collector
    policy: str


class Verdict(NamedTuple):
    """Why a VM is kept, and the test on whose account."""

    reason: str
    node: pytest.Item | pytest.Collector


def begin(item: pytest.Item) -> None:
    """A test starts, perhaps once more (reruns)."""
    item.stash[_failures_key] = []
    item.stash[_notes_key] = []
    item.stash[_done_key] = False


def note(item: pytest.Item, report: pytest.TestReport) -> None:
    """Note the final report of one phase of a test."""
    if report.failed and report.when is not None:
        item.stash.setdefault(_failures_key, []).append(_PHASES[report.when])
    if report.when == "teardown":
        item.stash[_done_key] = True


def add_note(item: pytest.Item, text: str) -> None:
    """Something that the test's report is to say."""
    item.stash.setdefault(_notes_key, []).append(text)


def notes_of(item: pytest.Item) -> list[str]:
    return item.stash.get(_notes_key, [])


def verdict(users: Sequence[User], never_ready: str) -> Verdict | None:
    """Whether, and why, a VM that these tests had is to be kept. None: it is not.

    ``never_ready`` is why it never got as far as a test. A skip, an expected
    failure and a pass keep nothing under the policy ``failed``; a test that was
    interrupted did not pass.
    """
    for user in users:
        trouble = _trouble(user.node)
        if trouble and user.policy in ("failed", "all"):
            return Verdict(never_ready or trouble, user.node)
    for user in users:
        if user.policy == "all":
            return Verdict("the policy is to keep all", user.node)
    return None


def _trouble(node: pytest.Item | pytest.Collector) -> str:
    if not isinstance(node, pytest.Item):
        return ""
    failures = node.stash.get(_failures_key, [])
    if failures:
        return ", and ".join(failures)
    return "" if node.stash.get(_done_key, True) else "the run was interrupted in it"
