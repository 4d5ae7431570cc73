"""Switching a guest off, and off and on again: asked first where that can be."""

from __future__ import annotations

import logging

from pytest_smolvm.backends.base import Machine
from pytest_smolvm.errors import OperationTimeoutError, SmolVMError
from pytest_smolvm.guest import Guest
from pytest_smolvm.images.guestfiles import COMPANION
from pytest_smolvm.process import Deadline

logger = logging.getLogger(__name__)

_SYNC_TIMEOUT_S = 2.0
_QUIT_TIMEOUT_S = 2.0
_ANSWER_TIMEOUT_S = 10.0


def power_off(vm_id: str, machine: Machine, guest: Guest | None, deadline: Deadline) -> None:
    """Ask the guest to switch itself off; what has not ended by the deadline runs on."""
    try:
        if guest is not None:
            _ask(guest, machine.power_off_program, deadline)
        else:
            machine.press_power_button()
    except SmolVMError as error:
        # The connection may well go down with the guest; or the guest is past
        # obeying, and then force is what is left.
        logger.debug("%s: asked to power off: %s", vm_id, error)
    if machine.wait(deadline.remaining_s()) is None:
        logger.warning(
            "%s did not switch itself off within %g s: it is ended by force",
            vm_id,
            deadline.timeout_s,
        )


def _ask(guest: Guest, name: str, deadline: Deadline) -> None:
    """Run one of init's programs in the guest; that it was done may never be heard.

    A guest whose first process is ours has programs of ours, too.
    """
    command = f"p={COMPANION}/bin/{name}; [ -x $p ] || p={name}; $p"
    guest.ask(command, max(0.1, min(_ANSWER_TIMEOUT_S, deadline.remaining_s())))


def settle(vm_id: str, machine: Machine, guest: Guest | None) -> None:
    """End the machine with what the guest had written in its disk's file, as far as can be.

    Takes seconds at most, whatever state the guest is in.
    """
    if guest is not None:
        try:
            guest.ask("sync", _SYNC_TIMEOUT_S)
        except SmolVMError as error:
            # Past answering: its disk is kept as after a power cut.
            logger.debug("%s: asked to write its disk: %s", vm_id, error)
    machine.quit(_QUIT_TIMEOUT_S)


def reset(vm_id: str, machine: Machine, guest: Guest, deadline: Deadline, *, force: bool) -> None:
    """Have the machine start again from its firmware; returns once it does.

    ``force``: at once, without asking the guest.
    """
    before = machine.resets
    if force:
        machine.reset()
    else:
        try:
            _ask(guest, "reboot", deadline)
        except SmolVMError as error:
            logger.debug("%s: asked to reboot: %s", vm_id, error)
    if not machine.wait_for_reset(before, deadline) and machine.poll() is None:
        raise OperationTimeoutError(
            f"rebooting the VM {vm_id!r}",
            deadline.timeout_s,
            "the guest did not reset the machine; reboot(force=True) does not ask it",
        )
