"""pytest-xdist: how many workers, which tests stay together, what workers are told and leave."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Mapping
from pathlib import Path, PurePath
from typing import Any

import pytest

from pytest_smolvm.hostmemory import available_mib
from pytest_smolvm.identity import ProcessIdentity
from pytest_smolvm.limits import DEFAULT_MEM_SIZE_MIB
from pytest_smolvm.plugin import outcomes
from pytest_smolvm.plugin.events import Event
from pytest_smolvm.plugin.session import run_of
from pytest_smolvm.plugin.settings import settings_of
from pytest_smolvm.plugin.summary import summary_of
from pytest_smolvm.plugin.wanted import WrongMarkerError, marker_arguments

OVERHEAD_MIB = 256
"""What a worker needs beside its guest's memory: Python, and QEMU's own."""

_capped_key = pytest.StashKey[str]()
_worker_died_key = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> Generator[None, int, int]:
    wanted = yield
    available = available_mib()
    if available is None:
        return wanted
    mem_size_mib: int = settings_of(config).config_fields.get("mem_size_mib", DEFAULT_MEM_SIZE_MIB)
    fitting = max(1, available // (mem_size_mib + OVERHEAD_MIB))
    if fitting < wanted:
        asked_for = config.option.numprocesses  # auto, or logical
        config.stash[_capped_key] = (
            f"smolvm: -n {asked_for} starts {fitting} of {wanted} workers: {available} MiB of "
            f"memory are free, and a worker with a VM of {mem_size_mib} MiB takes "
            f"{mem_size_mib + OVERHEAD_MIB}; smolvm_mem_size_mib makes VMs smaller, and a number "
            f"in the place of {asked_for} is taken as it is"
        )
    return min(wanted, fitting)


def pytest_report_header(config: pytest.Config) -> str:
    return config.stash.get(_capped_key, "")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """A worker is about to start: tell it of the run that it belongs to."""
    run = run_of(node.config)
    ourselves = ProcessIdentity.of(os.getpid())
    node.workerinput["smolvm"] = {
        "session_id": run.session_id,
        "heir": [ourselves.pid, ourselves.start_ticks] if ourselves else None,
        # Anything but a child of this process may be on another host.
        "remote": not node.gateway.spec.popen,
    }


@pytest.hookimpl(optionalhook=True, trylast=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    if error:
        node.config.stash[_worker_died_key] = True
        _adopt(node.config)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    try:
        return (yield)
    finally:
        if _may_have_left_vms(session):
            _adopt(session.config)


def _may_have_left_vms(session: pytest.Session) -> bool:
    """Whether it is worth looking; a run without VMs does not pay for loading the library."""
    config = session.config
    if not getattr(config.option, "tx", None) or hasattr(config, "workerinput"):
        return False
    # xdist ends workers that have not ended ten seconds after Ctrl-C. And one may have been
    # reported dead just before the kernel let go of its files.
    interrupted = session.exitstatus == pytest.ExitCode.INTERRUPTED
    return interrupted or config.stash.get(_worker_died_key, False)


def _adopt(config: pytest.Config) -> None:
    """Keep the VMs of workers that died, which cannot do that themselves any more."""
    ourselves = ProcessIdentity.of(os.getpid())
    summary = summary_of(config)
    if ourselves is None or summary is None:
        return
    from pytest_smolvm.plugin import retention
    from pytest_smolvm.statedir import default_state_dir
    from pytest_smolvm.store import Store

    state_dir = default_state_dir()
    if not (state_dir / "vms").is_dir():
        return
    store = Store(state_dir)
    run = run_of(config)
    for record in store.adopt(ourselves):
        assert record.retained is not None  # noqa: S101 - adopting is keeping
        directory = Path(store.vms, record.vm_id)
        summary.take(
            [
                Event(
                    kind="retained",
                    vm_id=record.vm_id,
                    test=record.usage.test,
                    reason=record.retained.reason,
                    directory=str(directory),
                    state_dir=str(store.root),
                    host=run.host,
                )
            ]
        )
        settings = settings_of(config)
        retention.enforce(
            store.root,
            run,
            count=settings.retention_count,
            max_mib=settings.retention_max_mib,
        )
    store.sweep()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    """With --dist loadgroup, keep tests that share a VM on one worker."""
    if not getattr(config.option, "loadgroup", False):
        return (yield)
    for item in items:
        outcomes.remember_name(item)
        group = _group_of(item, config)
        if group and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group))
    result = yield
    for item in items:
        if any(name.startswith("smolvm") for name in getattr(item, "fixturenames", ())):
            _tell_group(item)
    return result


def _tell_group(item: pytest.Item) -> None:
    """See that the group is in the node id, where xdist's scheduler looks for it.

    xdist 3.8 puts it into an attribute that pytest 9.2 has no more, and so
    forgets all groups (pytest-xdist, issue 1386).
    """
    groups = {
        str(marker.args[0] if marker.args else marker.kwargs.get("name", "default"))
        for marker in item.iter_markers("xdist_group")
    }
    suffix = f"@{'_'.join(sorted(groups))}"
    node_id: Any = getattr(item, "_id", None)
    if groups and node_id is not None and not item.nodeid.endswith(suffix):
        item._id = type(node_id).parse(item.nodeid + suffix)


def _group_of(item: pytest.Item, config: pytest.Config) -> str:
    """The same for tests that would share a VM; empty: this one shares none."""
    names = getattr(item, "fixturenames", ())
    if "smolvm_session" in names:
        return "smolvm-session"
    if "smolvm" not in names:
        return ""
    try:
        arguments = marker_arguments(item)
    except WrongMarkerError:
        return ""  # its set-up will say so
    scope = arguments.pop("scope", settings_of(config).scope)
    for name in ("retain", "boot_timeout"):
        arguments.pop(name, None)
    node: Any = {"class": pytest.Class, "module": pytest.Module}.get(scope)
    parent = item.getparent(node) if node else None
    if scope != "session" and parent is None:
        return ""
    told_apart = repr([parent.nodeid if parent else "", _described(arguments)])
    digest = hashlib.sha256(told_apart.encode()).hexdigest()[:8]
    return f"smolvm-{scope}-{digest}"


def _described(value: Any) -> object:
    """What all workers say of a value alike: no addresses, no order of hashes.

    That different values are described alike does no harm: their tests merely stay together.
    """
    if isinstance(value, Mapping):
        return sorted((str(key), _described(entry)) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return [_described(entry) for entry in value]
    if isinstance(value, (str, int, float, PurePath, type(None))):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)
