"""The VMs that this process made and has not deleted."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_smolvm.vm import SmolVM

_vms: dict[tuple[int, str], SmolVM] = {}
_guard = threading.Lock()


def add(vm: SmolVM) -> None:
    with _guard:
        _vms[os.getpid(), vm.vm_id] = vm


def discard(vm_id: str) -> None:
    with _guard:
        _vms.pop((os.getpid(), vm_id), None)


def find(vm_id: str) -> SmolVM | None:
    """This process's VM of that id. A forked child has none of its parent's."""
    with _guard:
        return _vms.get((os.getpid(), vm_id))


@atexit.register
def _delete_all() -> None:
    """What a program forgot to delete goes with it (the machines would in any case)."""
    for (pid, vm_id), vm in list(_vms.items()):
        if pid == os.getpid():
            try:
                vm.delete()
            except Exception as error:  # noqa: BLE001 - the others must go all the same
                print(f"pytest-smolvm: {vm_id}: {error}", file=sys.stderr)  # noqa: T201
