"""One test run: its id, its place, and what is shared by all of its processes."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from pytest_smolvm.plugin.settings import is_remote_worker

if TYPE_CHECKING:
    from pytest_smolvm.plugin.fleet import Fleet


@dataclass(frozen=True)
class TestRun:
    """What the VMs of one run have in common, whichever worker boots them."""

    __test__ = False

    session_id: str
    """Ids of later runs sort after those of earlier ones."""
    project: str
    heir: tuple[int, int] | None = None
    """The controller's pid and start, if it is on this host and may outlive us."""
    host: str = ""


_run_key = pytest.StashKey[TestRun]()
_fleet_key = pytest.StashKey["Fleet"]()
_bound_key = pytest.StashKey[bool]()


def run_of(config: pytest.Config) -> TestRun:
    """This run; a worker of xdist learns it from its controller."""
    run = config.stash.get(_run_key, None)
    if run is None:
        run = config.stash[_run_key] = _describe(config)
    return run


def _describe(config: pytest.Config) -> TestRun:
    given: Mapping[str, Any] = getattr(config, "workerinput", {}).get("smolvm", {})
    session_id = given.get("session_id") or _new_session_id()
    heir = given.get("heir")
    return TestRun(
        session_id=str(session_id),
        project=str(config.rootpath),
        heir=(int(heir[0]), int(heir[1])) if heir and not is_remote_worker(config) else None,
        host=platform.node(),
    )


def _new_session_id() -> str:
    # Two runs may begin in one moment: the rest tells them apart.
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{os.urandom(3).hex()}"


def fleet_of(config: pytest.Config) -> Fleet:
    """The VMs of this process, whose library is loaded with the first of them."""
    fleet = config.stash.get(_fleet_key, None)
    if fleet is None:
        end_with_controller(config)
        from pytest_smolvm.plugin.fleet import Fleet

        fleet = config.stash[_fleet_key] = Fleet(config)
    return fleet


def end_with_controller(config: pytest.Config) -> None:
    """Have a worker of xdist end as soon as its controller is no more, whatever it does then.

    execnet lets it go on for up to a quarter of a minute, and its machines with it.
    """
    heir = run_of(config).heir
    if heir is not None and not config.stash.get(_bound_key, False):
        from pytest_smolvm.hostloop import end_with
        from pytest_smolvm.identity import ProcessIdentity

        config.stash[_bound_key] = True
        end_with(ProcessIdentity(*heir))


def existing_fleet(config: pytest.Config) -> Fleet | None:
    """The VMs of this process, if any were asked for."""
    return config.stash.get(_fleet_key, None)
