"""VMs made ready ahead of whoever wants them, in the background."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from pytest_smolvm.admission import admitted
from pytest_smolvm.config import VMConfig, generate_vm_id
from pytest_smolvm.hostload import processors_are_busy
from pytest_smolvm.process import Deadline
from pytest_smolvm.startup import Preparation
from pytest_smolvm.store import shared_store
from pytest_smolvm.vm import SmolVM

logger = logging.getLogger(__name__)

_END_TIMEOUT_S = 5.0
_SPARE_TIMEOUT_S = 0.5
_SPARE_LOOK_S = 0.01


@dataclass(frozen=True)
class Wish:
    """A VM that somebody will want. Wishes of one ``key`` are served by the same VMs."""

    key: str
    config: VMConfig
    accelerator: str = "auto"
    restore: bool = True
    preparation: Preparation | None = None
    boot_timeout: float | None = None


@dataclass
class _Making:
    """One VM that is being made ready, or is ready."""

    wish: Wish
    vm_id: str = field(default_factory=generate_vm_id)
    vm: SmolVM | None = None
    ready: bool = False
    dropped: bool = False
    wanted: threading.Event = field(default_factory=threading.Event)
    """Set when somebody waits for it."""
    done: threading.Event = field(default_factory=threading.Event)
    guard: threading.Lock = field(default_factory=threading.Lock)


class Pool:
    """Keeps VMs ready for wishes; what it makes it deletes, but for what was taken.

    Nothing of it is an error of anybody's: a VM that cannot be made ready is not there, and
    whoever wants it makes it himself, and is told.
    """

    def __init__(self) -> None:
        self._makings: list[_Making] = []
        self._ending: list[threading.Thread] = []

    def expect(self, wishes: Sequence[Wish]) -> None:
        """Make these ready, in their order, if they are not; drop what is not among them."""
        wanted = list(wishes)
        for making in list(self._makings):
            match = next((wish for wish in wanted if wish.key == making.wish.key), None)
            if match is None or (making.done.is_set() and not making.ready):
                self._drop(making)
            else:
                wanted.remove(match)
        if not wanted:
            return
        fresh = [_Making(wish) for wish in wanted]
        self._makings += fresh
        threading.Thread(
            target=_make_each, args=(fresh,), name="smolvm-prefetch", daemon=True
        ).start()

    def id_for(self, key: str) -> str | None:
        """The id of the VM that serves, or will serve, such a wish; None: there is none."""
        return next((making.vm_id for making in self._makings if making.wish.key == key), None)

    def has(self, vm_id: str) -> bool:
        """Whether the VM of that id is one of these."""
        return any(making.vm_id == vm_id for making in self._makings)

    def take(self, vm_id: str, key: str) -> SmolVM | None:
        """The VM of that id, waited for if need be; None: it serves no such wish, or came to
        nothing, and is dropped.

        It belongs to the caller then.
        """
        making = next((making for making in self._makings if making.vm_id == vm_id), None)
        if making is None:
            return None
        if making.wish.key == key:
            making.wanted.set()
            # It ends with the VM's own boot timeout at the latest.
            making.done.wait()
            if making.ready and making.vm is not None and making.vm.is_running:
                self._makings.remove(making)
                return making.vm
        self._drop(making)
        return None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it, neither ready nor under way."""
        return not self._makings

    def close(self) -> None:
        """Delete all that nobody took; returns when it is gone, or after some seconds."""
        for making in list(self._makings):
            self._drop(making)
        deadline = Deadline(_END_TIMEOUT_S)
        for thread in self._ending:
            thread.join(deadline.remaining_s())
        self._ending = [thread for thread in self._ending if thread.is_alive()]

    def _drop(self, making: _Making) -> None:
        if making in self._makings:
            self._makings.remove(making)
        thread = threading.Thread(
            target=_end, args=(making,), name="smolvm-prefetch-end", daemon=True
        )
        self._ending = [*(each for each in self._ending if each.is_alive()), thread]
        making.wanted.set()
        thread.start()


def _make_each(makings: Sequence[_Making]) -> None:
    for making in makings:
        try:
            making.ready = _make(making)
        except Exception:
            # The test that wants it will meet the same, and show it.
            logger.debug("a VM could not be made ready ahead", exc_info=True)
        finally:
            making.done.set()


def _wait_for_spare_processors(wanted: threading.Event) -> None:
    """Wait while all processors are busy: making a VM then would only slow the tests down.

    Not for long, lest there never is one; and not once somebody waits.
    """
    deadline = Deadline(_SPARE_TIMEOUT_S)
    while not deadline.passed() and processors_are_busy():
        if wanted.wait(_SPARE_LOOK_S):
            return


def _make(making: _Making) -> bool:
    _wait_for_spare_processors(making.wanted)
    wish = making.wish
    config = wish.config.model_copy(update={"vm_id": making.vm_id})
    with admitted(shared_store(), config.vm_id, config.mem_size_mib) as fits:
        if not fits:
            logger.debug("no VM is made ready ahead: the host's memory is short")
            return False
        with making.guard:
            if making.dropped:
                return False
            making.vm = vm = SmolVM(config, accelerator=wish.accelerator, restore=wish.restore)
        if wish.preparation is not None and not vm.is_prepared(wish.preparation):
            # What prepares it is the suite's own code: it runs in no thread but the suite's.
            return False
        vm.start(wish.boot_timeout, preparation=wish.preparation)
    return True


def _end(making: _Making) -> None:
    with making.guard:
        making.dropped = True
        vm = making.vm
    if vm is None:
        return
    try:
        vm.abort_start()
        making.done.wait()
        vm.delete()
    except Exception:
        logger.warning("%s, made ready ahead, could not be ended", vm.vm_id, exc_info=True)
