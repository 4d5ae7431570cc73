"""pytest-xdist: how many workers there are, what they are told, what they leave."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

from pytest_smolvm.hostmemory import available_mib
from pytest_smolvm.identity import ProcessIdentity
from pytest_smolvm.limits import DEFAULT_MEM_SIZE_MIB
from pytest_smolvm.plugin.events import Event
from pytest_smolvm.plugin.session import run_of
from pytest_smolvm.plugin.settings import settings_of
from pytest_smolvm.plugin.summary import summary_of

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
    adopted = store.adopt(ourselves)
    summary.take(
        Event(
            kind="retained",
            vm_id=record.vm_id,
            test=record.usage.test,
            reason=record.retained.reason if record.retained else "",
            directory=str(store.vms / record.vm_id),
            state_dir=str(store.root),
            host=run.host,
        )
        for record in adopted
    )
    if adopted:
        retention.enforce(store.root, config)
    store.sweep()
