"""The VMs of one pytest process: leased to tests, shared by scope, ended when all is known."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from pytest_smolvm.admission import admitted
from pytest_smolvm.config import VMConfig, generate_vm_id
from pytest_smolvm.plugin import outcomes, retention
from pytest_smolvm.plugin.events import Event
from pytest_smolvm.plugin.foresight import Foresight, pool_key
from pytest_smolvm.plugin.grouping import name_of
from pytest_smolvm.plugin.header import describe_host
from pytest_smolvm.plugin.preparation import preparation_of
from pytest_smolvm.plugin.progress import told_when_slow
from pytest_smolvm.plugin.session import run_of
from pytest_smolvm.plugin.settings import settings_of
from pytest_smolvm.plugin.wanted import Wanted
from pytest_smolvm.pool import Pool, Wish
from pytest_smolvm.records import Usage, VMState
from pytest_smolvm.store import shared_store
from pytest_smolvm.vm import SmolVM

logger = logging.getLogger(__name__)

_HEALTH_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0
_AT_ONCE = 32
_SESSION_KEY = "smolvm_session"

Node = pytest.Item | pytest.Collector


@dataclass
class Lease:
    """One VM, and the tests that have had it."""

    vm: SmolVM
    node: Node
    """When the run leaves this node, the VM ends."""
    key: str
    users: list[outcomes.User] = field(default_factory=list)
    never_ready: str = ""
    """Why it never got as far as a test."""
    error: BaseException | None = None
    """What was raised then."""
    worth_keeping: bool = True


class Fleet:
    """Every VM that this process has booted for tests and not ended yet."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._settings = settings_of(config)
        self._run = run_of(config)
        self._leases: list[Lease] = []
        self._events: list[Event] = []
        self._foresight = Foresight(config)
        self._pool = Pool() if self._settings.prefetch else None

    # -- asking ---------------------------------------------------------------

    def lease(
        self, item: pytest.Item, config: VMConfig, wanted: Wanted, *, shared: bool = True
    ) -> SmolVM:
        """A VM for the test: a new one, or the one that its scope has already."""
        if shared:
            self._foresight.learn(item, config, wanted)
        node = scope_node(item, wanted.scope) if shared else item
        user = outcomes.User(item, wanted.retain)
        if node is item:
            return self._boot(node, config, wanted, user, key="").vm
        key = _key(config, wanted)
        return self._shared(node, key, config, wanted, user).vm

    def lease_for_session(
        self, session: pytest.Session, config: VMConfig, wanted: Wanted
    ) -> SmolVM:
        """The VM of ``smolvm_session``; who uses it is told by ``note_session_user``."""
        user = outcomes.User(session, wanted.retain)
        return self._boot(session, config, wanted, user, key=_SESSION_KEY).vm

    def session_vm_is_fit(self, item: pytest.Item) -> bool:
        """Whether the VM of ``smolvm_session`` can serve ``item``; one that cannot is ended."""
        for lease in self._session_leases():
            why = "" if lease.error is not None else self._unfit(lease)
            if why:
                self._replace(lease, item, why)
                return False
        return True

    def note_session_user(self, item: pytest.Item) -> None:
        """``item`` has the VM of ``smolvm_session``, or was to have it; told twice, noted once."""
        for lease in self._session_leases():
            if all(user.node is not item for user in lease.users):
                self._join(lease, outcomes.User(item, self._settings.retain))

    def _session_leases(self) -> list[Lease]:
        return [lease for lease in self._leases if lease.key == _SESSION_KEY]

    def vms_of(self, item: pytest.Item) -> list[SmolVM]:
        """The VMs that the test has, or whose boot it failed with."""
        return [
            lease.vm for lease in self._leases if any(user.node is item for user in lease.users)
        ]

    @property
    def live_vms(self) -> list[SmolVM]:
        """All VMs that run."""
        return [lease.vm for lease in self._leases if lease.vm.status is VMState.RUNNING]

    def take_events(self) -> list[Event]:
        """What has happened since this was last asked."""
        events, self._events = self._events, []
        return events

    def note_trouble(self, errors: Sequence[Exception]) -> None:
        """Have the summary tell of VMs that could not be ended, where no report is left to."""
        self._events += [
            Event(kind="trouble", text=f"a VM could not be ended: {error}") for error in errors
        ]

    # -- ending ---------------------------------------------------------------

    def leave(self, nextitem: pytest.Item | None) -> list[Exception]:
        """End the VMs of all nodes that the next test is not in; what went wrong is returned."""
        staying = [] if nextitem is None else nextitem.listchain()
        ended = [lease for lease in self._leases if lease.node not in staying]
        self._leases = [lease for lease in self._leases if lease.node in staying]
        if nextitem is None and self._pool is not None:
            self._pool.close()
        return self._end_all(ended)

    def end(self) -> list[Exception]:
        """End all VMs; what went wrong is returned."""
        return self.leave(None)

    def _end_all(self, leases: Sequence[Lease]) -> list[Exception]:
        if len(leases) < 2:
            return [error for lease in leases if (error := self._try_to_end(lease))]
        # Side by side: xdist gives a worker ten seconds for all of it.
        told_before = len(self._events)
        with ThreadPoolExecutor(_AT_ONCE, "smolvm-end") as threads:
            errors = [error for error in threads.map(self._try_to_end, leases) if error]
        order = [lease.vm.vm_id for lease in leases]
        told = sorted(self._events[told_before:], key=lambda event: order.index(event["vm_id"]))
        self._events[told_before:] = told
        return errors

    def _try_to_end(self, lease: Lease) -> Exception | None:
        try:
            self._end(lease)
        except Exception as error:
            logger.debug("%s could not be ended", lease.vm.vm_id, exc_info=True)
            return error
        return None

    def _end(self, lease: Lease) -> None:
        vm = lease.vm
        if vm.deleted:
            return  # by the test itself
        verdict = outcomes.verdict(lease.users, lease.never_ready)
        keeps_disk = vm.config.retain_disk_on_delete and vm.config.disk_mode == "isolated"
        if keeps_disk and vm.status is not VMState.CREATED:
            vm.stop(timeout=_STOP_TIMEOUT_S)
        if verdict is None or not lease.worth_keeping:
            vm.delete()
            if not vm.directory.exists():
                return
            reason, test = "retain_disk_on_delete=True", name_of(lease.users[-1].node)
        else:
            reason, test = verdict.reason, name_of(verdict.node)
            vm.usage = vm.usage.model_copy(update={"test": test})
            vm.retain(reason)
        self._tell(kind="retained", vm=vm, test=test, reason=reason, directory=str(vm.directory))
        retention.enforce(vm.state_dir, self._config)

    # -- within ---------------------------------------------------------------

    def _shared(
        self, node: Node, key: str, config: VMConfig, wanted: Wanted, user: outcomes.User
    ) -> Lease:
        for lease in self._leases:
            if lease.node is node and lease.key == key:
                if lease.error is not None:
                    # As for any fixture of that scope: it failed once for all of them.
                    raise lease.error
                why = self._unfit(lease)
                if not why:
                    self._join(lease, user)
                    return lease
                self._replace(lease, user.node, why)
        return self._boot(node, config, wanted, user, key)

    def _join(self, lease: Lease, user: outcomes.User) -> None:
        first = all(isinstance(known.node, pytest.Session) for known in lease.users)
        lease.users.append(user)
        lease.vm.usage = self._usage(user, lease.users)
        _set_properties(user.node, lease.vm)
        if not first:
            self._tell(kind="reused", vm=lease.vm, test=name_of(user.node))

    def _replace(self, lease: Lease, node: Node, why: str) -> None:
        self._leases.remove(lease)
        self._tell(kind="replaced", vm=lease.vm, test=name_of(node), reason=why)
        if isinstance(node, pytest.Item):
            text = f"{lease.vm.vm_id}, which was shared, {why}: another took its place"
            outcomes.add_note(node, text)
            node.user_properties.append(("smolvm_replaced_vm_id", lease.vm.vm_id))
        self._end(lease)

    @staticmethod
    def _unfit(lease: Lease) -> str:
        """Why a shared VM cannot serve the next test; empty: it can."""
        vm = lease.vm
        if vm.deleted:
            return "had been deleted"
        if vm.status is VMState.PAUSED:
            vm.resume()
        if vm.status is VMState.ERROR:
            return "had died"
        if vm.status is not VMState.RUNNING:
            return "had been switched off"
        if vm.config.offers_ssh and not vm.answers(_HEALTH_TIMEOUT_S):
            return f"did not answer within {_HEALTH_TIMEOUT_S:g} s"
        return ""

    def _boot(
        self, node: Node, config: VMConfig, wanted: Wanted, user: outcomes.User, key: str
    ) -> Lease:
        of_another = self._pool is not None and self._pool.has(config.vm_id)
        vm = self._take_ready(config, wanted, user)
        ready = vm is not None
        if vm is None:
            if of_another and "vm_id" not in config.model_fields_set:
                # The id came with a VM that is not what is wanted after all.
                config = config.model_copy(update={"vm_id": generate_vm_id()})
            vm = SmolVM(config, accelerator=wanted.accel, restore=wanted.restore)
        lease = Lease(vm, node, key, [user], never_ready="it did not boot")
        self._leases.append(lease)
        vm.usage = self._usage(user, lease.users)
        try:
            if not ready:
                self._start(lease, wanted, user)
            self._tell_started(vm, user)
            lease.never_ready = "it could not be prepared"
            self._config.hook.pytest_smolvm_started(item=user.node, vm=vm)
        except BaseException as error:
            # A machine that never ran, or that nobody waited for, has nothing to tell.
            launched = "launch" in vm.timings
            _set_properties(user.node, vm)
            lease.worth_keeping = launched and not isinstance(error, KeyboardInterrupt)
            lease.error = error
            raise
        finally:
            for text in vm.troubles:
                self._note_template(text)
        _set_properties(user.node, vm)
        lease.never_ready = ""
        return lease

    def _start(self, lease: Lease, wanted: Wanted, user: outcomes.User) -> None:
        vm = lease.vm
        preparation, problem = preparation_of(wanted)
        if problem:
            self._note_template(f"prepare is run for each VM: {problem}; give prepare_key")
        if preparation is not None:
            run = preparation.run

            def noted(vm: SmolVM) -> None:
                lease.never_ready = "it could not be prepared"
                run(vm)
                lease.never_ready = "it did not boot"

            preparation = replace(preparation, run=noted)
        with told_when_slow(self._config, f"{vm.vm_id} is booting for {name_of(user.node)}"):
            vm.start(boot_timeout=wanted.boot_timeout, keep_failed=True, preparation=preparation)

    def _take_ready(self, config: VMConfig, wanted: Wanted, user: outcomes.User) -> SmolVM | None:
        """A VM that was made ready for such a test, if there is one."""
        if self._pool is None:
            return None
        with told_when_slow(self._config, f"a VM is made ready for {name_of(user.node)}"):
            vm = self._pool.take(config.vm_id, pool_key(config, wanted))
        if vm is None and not self._pool.is_empty:
            with admitted(shared_store(), config.vm_id, config.mem_size_mib) as fits:
                if not fits:
                    self._pool.close()
        return vm

    def id_of_ready(self, item: pytest.Item, wanted: Wanted) -> str | None:
        """The id of the VM that was made ready for a test; None: there is none."""
        config = self._foresight.foresee(item, wanted)
        if self._pool is None or config is None:
            return None
        return self._pool.id_for(pool_key(config, wanted))

    def foresee(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """Have the VMs of the tests that come next made ready while ``item`` runs."""
        if self._pool is None:
            return
        wishes: list[Wish] = []
        for coming, wanted, wish in self._foresight.wishes(item, nextitem):
            if self._will_boot(coming, wanted, wishes):
                wishes.append(wish)
            if len(wishes) == self._settings.prefetch:
                break  # before the next one is worked out
        self._pool.expect(wishes)

    def _will_boot(self, item: pytest.Item, wanted: Wanted, wishes: Sequence[Wish]) -> bool:
        """Whether the test's VM is one that nobody has yet."""
        node = scope_node(item, wanted.scope)
        if node is item:
            return True
        return not wishes and all(lease.node is not node for lease in self._leases)

    def _note_template(self, text: str) -> None:
        self._events.append(Event(kind="template", text=text))

    def _usage(self, user: outcomes.User, users: Sequence[outcomes.User]) -> Usage:
        heir = self._run.heir
        if heir is None or all(known.policy == "none" for known in users):
            heir = None
        return Usage(
            test=name_of(user.node),
            project=self._run.project,
            session=self._run.session_id,
            heir_pid=heir[0] if heir else None,
            heir_start_ticks=heir[1] if heir else None,
        )

    def _tell_started(self, vm: SmolVM, user: outcomes.User) -> None:
        if not self._config.stash.get(_header_told_key, False):
            self._config.stash[_header_told_key] = True
            self._events.append(Event(kind="header", text=describe_host(self._settings)))
        took = sum(vm.timings.values())
        self._tell(
            kind="started",
            vm=vm,
            test=name_of(user.node),
            seconds=took,
            restored=vm.restored,
            templates_made=vm.templates_made,
        )

    def _tell(self, *, vm: SmolVM, **facts: Any) -> None:
        state_dir = str(vm.state_dir)
        event: dict[str, Any] = {"vm_id": vm.vm_id, "state_dir": state_dir, **facts}
        self._events.append(cast(Event, {**event, "host": self._run.host}))


_header_told_key = pytest.StashKey[bool]()


def scope_node(item: pytest.Item, scope: str) -> Node:
    """The node whose tests share a VM of that scope."""
    if scope == "session":
        return item.session
    found: Node | None = None
    if scope == "module":
        found = item.getparent(pytest.Module)
    elif scope == "class":
        # A function outside any class is a class of its own, as for pytest's fixtures.
        found = item.getparent(pytest.Class)
    return item if found is None else found


def _key(config: VMConfig, wanted: Wanted) -> str:
    """Equal for tests that may share a VM."""
    fields = config.model_dump(mode="json")
    if "vm_id" not in config.model_fields_set:
        del fields["vm_id"]
    preparation, problem = preparation_of(wanted)
    # Functions that have no name are equal when they are the same one.
    prepared = id(wanted.prepare) if problem else preparation and preparation.key
    return json.dumps([fields, wanted.accel, wanted.restore, prepared], sort_keys=True)


def _set_properties(node: Node, vm: SmolVM) -> None:
    """For JUnit's XML."""
    if not isinstance(node, pytest.Item):
        return
    node.user_properties.append(("smolvm_vm_id", vm.vm_id))
    if vm.backend_name:
        node.user_properties.append(("smolvm_backend", f"{vm.backend_name} ({vm.accelerator})"))
    if vm.timings:
        took = sum(vm.timings.values())
        node.user_properties.append(("smolvm_boot_time_s", f"{took:.3f}"))
