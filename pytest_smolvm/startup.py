"""How a VM starts: from a template where there is one, by booting where there is none.

What a VM has to get to is a list of levels: the guest has booted, then something was prepared in
it. Each level has a template. Whoever finds none takes the level below and makes it.
"""

from __future__ import annotations

import collections
import logging
import signal
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_smolvm import access, booting, diagnosis
from pytest_smolvm.backends.base import Backend, Machine
from pytest_smolvm.errors import OperationTimeoutError, SmolVMError
from pytest_smolvm.guest import Guest
from pytest_smolvm.journal import Journal
from pytest_smolvm.process import Deadline
from pytest_smolvm.records import VMState
from pytest_smolvm.saving import Saving
from pytest_smolvm.templates import Template, base_key, prepared_key, shared_templates
from pytest_smolvm.waking import Identity

if TYPE_CHECKING:
    from pytest_smolvm.ssh import Login
    from pytest_smolvm.vm import SmolVM

logger = logging.getLogger(__name__)

_WAKE_TIMEOUT_S = 60.0
_GIVE_UP_AFTER = 2
_PREPARE_TIMEOUT_S = 900.0
_failures: collections.Counter[str] = collections.Counter()
"""How often this process met a template that was of no use, by key."""


@dataclass(frozen=True)
class Preparation:
    """What is done in a VM before anybody gets it."""

    key: str
    """Equal for equal work, whose result is kept as a template; empty: there is no telling, and
    it is done for each VM."""
    run: Callable[[SmolVM], object]


@dataclass(frozen=True)
class _Level:
    key: str
    enter: Callable[[], object]
    """Does what this level has over the one below."""


class Startup(Saving):
    """The part of ``SmolVM`` that gets a machine to run and a guest to answer."""

    _journal: Journal
    _host_key: str
    _during: str
    _restore: bool
    _template: Template | None
    _troubles: list[str]
    _templates_made: int
    _aborted: bool
    _preparing: bool
    """Whether its preparation is under way, or has failed."""

    @abstractmethod
    def _write_record(self) -> None:
        """Let other processes know how things stand."""

    def _start_up(
        self, backend: Backend, boot_timeout: float | None, preparation: Preparation | None
    ) -> None:
        self._backend = backend
        self._preparing = False
        timeout_s = Deadline(
            booting.boot_timeout_s(boot_timeout, backend), "boot_timeout"
        ).timeout_s
        login = self._login()
        if self._template is not None and not self._files.disk.exists():
            self._check_fits(self._template)
            self._start_from(self._template, login, timeout_s)
            if self._config.env_vars != self._template.config.env_vars:
                self._set_env_vars()
        else:
            levels = self._levels(preparation)
            if levels:
                self._reach(levels, login, timeout_s)
            else:
                self._cold_boot(login, timeout_s)
                self._set_env_vars()
            if preparation is not None and len(levels) < 2:
                self._prepare_by(preparation.run)
        logger.debug("%s started: %s", self._config.vm_id, self._timings)

    @property
    @abstractmethod
    def _itself(self) -> SmolVM: ...

    @abstractmethod
    def _choose(self) -> Backend:
        """The backend that runs it."""

    def _login(self) -> Login | None:
        if self._config.offers_ssh:
            login = access.prepare_login(
                self._config, self._ssh_user, self._ssh_key_path, self._store
            )
            self._host_key = login.host_key
            return login
        if self._config.env_vars:
            access.check_offers_ssh(self._config)
        return None

    def abort_start(self) -> None:
        """Have a ``start()`` that is under way in another thread fail soon."""
        self._aborted = True
        machine = self._machine
        if machine is not None:
            machine.kill()

    def is_prepared(self, preparation: Preparation) -> bool:
        """Whether there is a template in which that was done, for ``start()`` to begin with."""
        self._backend = self._choose()
        levels = self._levels(preparation)
        return len(levels) > 1 and (shared_templates(self._store).root / levels[-1].key).is_dir()

    @property
    def restored(self) -> bool:
        """Whether the last start was from a template; False: the guest booted."""
        return "restore" in self._timings

    @property
    def troubles(self) -> list[str]:
        """Why templates could not be used, or not be made; texts for people."""
        return list(self._troubles)

    @property
    def templates_made(self) -> int:
        """How many templates its starts have left for others."""
        return self._templates_made

    # -- by booting -----------------------------------------------------------

    def _cold_boot(self, login: Login | None, timeout_s: float) -> None:
        assert self._backend is not None  # noqa: S101 - chosen
        deadline = Deadline(timeout_s, "boot_timeout")
        if not self._files.disk.exists():
            self._layers = []  # those of a template that could not be used
        layers = [self._files.path / name for name in self._layers]
        launched = booting.launch(
            self._config, self._backend, self._files, layers, self._store, deadline
        )
        self._adopt(launched)
        if login is not None:
            self._meet(launched.machine, login)
            banner_at = self._connect(deadline, "while booting")
            self._timings["boot"] = banner_at - launched.at
            self._timings["ssh"] = time.monotonic() - banner_at
            launched.machine.booted()

    def _adopt(self, launched: booting.Launched) -> None:
        self._machine, self._spec = launched.machine, launched.spec
        self._timings = launched.timings
        self._state = VMState.RUNNING
        if self._aborted:
            raise SmolVMError(f"the start of the VM {self._config.vm_id!r} was aborted")
        self._write_record()

    def _meet(self, machine: Machine, login: Login) -> None:
        console = self._files.console
        guest = Guest(
            machine.ssh_address,
            login,
            self._check_usable,
            lambda: diagnosis.circumstances(machine.pid, console),
            self._journal,
            lambda: machine.has_given_sign,
        )
        # Whoever waits for it then hears why, at once.
        machine.when_stalled(guest.disconnect)
        self._guest = guest

    def _connect(self, deadline: Deadline, during: str) -> float:
        assert self._guest is not None and self._machine is not None  # noqa: S101, PT018
        self._during = during
        try:
            return self._guest.connect(deadline)
        except OperationTimeoutError as error:
            end = self._machine.poll()
            console = self._files.console
            if end is not None:
                raise diagnosis.died(self._config.vm_id, during, end, console) from None
            raise diagnosis.never_answered(
                self._config.vm_id, error, self._machine, console
            ) from None
        finally:
            self._during = "on its own"

    def _set_env_vars(self) -> None:
        if self._config.env_vars and self._guest is not None:
            self._guest.set_env_vars(self._config.env_vars)

    def _prepare_by(self, run: Callable[[SmolVM], object]) -> None:
        began = time.monotonic()
        self._preparing = True
        run(self._itself)
        self._preparing = False
        self._timings["prepare"] = time.monotonic() - began

    # -- by templates -----------------------------------------------------------

    def _levels(self, preparation: Preparation | None) -> list[_Level]:
        """What this VM has to get to; empty: it cannot be restored."""
        config, backend = self._config, self._backend
        assert backend is not None  # noqa: S101 - chosen
        wanted = self._restore and config.offers_ssh and not self._files.disk.exists()
        if not wanted or self._why_not_saved():
            return []
        spec = booting.machine_spec(config, backend, self._files)
        key = base_key(config, backend, spec, self._store)
        levels = [_Level(key, lambda: None)]
        if preparation is not None and preparation.key:
            prepare = preparation.run
            own_key = prepared_key(key, config, preparation.key)
            levels.append(_Level(own_key, lambda: self._prepare_by(prepare)))
        return [] if any(_failures[level.key] >= _GIVE_UP_AFTER for level in levels) else levels

    def _reach(self, levels: list[_Level], login: Login | None, timeout_s: float) -> None:
        assert login is not None  # noqa: S101 - else there are no levels
        if not levels:
            self._cold_boot(login, timeout_s)
            return
        *below, level = levels
        if self._start_from_kept(level.key, login, timeout_s, first=not below):
            return
        patience_s = timeout_s + (_PREPARE_TIMEOUT_S if below else 0)
        with shared_templates(self._store).making(
            level.key, patience_s, self._note_wait
        ) as may_make:
            if self._start_from_kept(level.key, login, timeout_s, first=not below):
                return  # made just now
            self._reach(below, login, timeout_s)
            level.enter()
            self._make_template(level.key, may_make=may_make, first=not below)

    def _note_wait(self) -> None:
        logger.debug("%s waits for another's template", self._config.vm_id)

    def _start_from_kept(self, key: str, login: Login, timeout_s: float, *, first: bool) -> bool:
        templates = shared_templates(self._store)
        try:
            template = templates.find(key)
            if template is None:
                return False
            env_vars = self._config.env_vars if first else None
            self._start_from(template, login, timeout_s, env_vars)
        except (SmolVMError, OSError) as error:
            if self._aborted or self._was_killed(error):
                raise  # which says nothing of the template
            self._note_trouble(key, f"a template could not be used, and is made anew: {error}")
            self._end_machine()
            self._files.disk.unlink(missing_ok=True)
            templates.discard(key)
            return False
        _failures.pop(key, None)
        return True

    def _was_killed(self, error: Exception) -> bool:
        """Whether somebody killed the machine (the kernel, mostly, for want of memory)."""
        end = self._machine.poll() if self._machine is not None else None
        status = end.exit_status if end else getattr(error, "exit_status", None)
        return status == -signal.SIGKILL

    def _start_from(
        self,
        template: Template,
        login: Login | None,
        timeout_s: float,
        env_vars: dict[str, str] | None = None,
    ) -> None:
        assert self._backend is not None and login is not None  # noqa: S101, PT018
        deadline = Deadline(timeout_s, "boot_timeout")
        launched = booting.launch_from(template, self._config, self._backend, self._files, deadline)
        self._layers = launched.layers
        self._adopt(launched)
        self._meet(launched.machine, login)
        # One that wakes does so at once; there is another way if it does not.
        wake_deadline = Deadline(min(deadline.remaining_s(), _WAKE_TIMEOUT_S))
        try:
            self._wake(Identity(self._config.vm_id, env_vars), wake_deadline)
        except SmolVMError:
            self._check_usable(0)  # a machine that died says more
            raise
        woken = time.monotonic()
        self._timings["restore"] = woken - launched.at
        self._log_in_on_port(deadline)
        self._timings["ssh"] = time.monotonic() - woken

    def _make_template(self, key: str, *, may_make: bool, first: bool) -> None:
        """Keep what the guest is now as a template, if that can be; the VM lives on."""
        began = time.monotonic()
        env_vars = self._config.env_vars if first else None
        if may_make:
            templates = shared_templates(self._store)
            try:
                identity = Identity(self._config.vm_id, env_vars)
                self._save(lambda write: templates.make(key, write), key, identity, fresh=first)
                self._templates_made += 1
            except (SmolVMError, OSError) as error:
                if self._aborted:
                    raise
                self._note_trouble(key, f"a template could not be made: {error}")
                self._check_usable(0)
            else:
                self._timings["template"] = time.monotonic() - began
                return
        if first:
            self._set_env_vars()

    def _go_back_to(self, template: Template) -> None:
        assert self._backend is not None  # noqa: S101 - it started once
        self._start_from(template, self._login(), booting.boot_timeout_s(None, self._backend))

    def _note_trouble(self, key: str, text: str) -> None:
        _failures[key] += 1
        logger.warning("%s: %s", self._config.vm_id, text)
        self._troubles.append(text)
