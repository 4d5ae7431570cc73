"""Another process's VM, as one that may look into it sees it."""

from __future__ import annotations

from pathlib import Path

from pytest_smolvm import access, diagnosis
from pytest_smolvm.config import VMConfig
from pytest_smolvm.errors import SmolVMError, VMNotFoundError
from pytest_smolvm.guest import Guest
from pytest_smolvm.journal import Journal
from pytest_smolvm.records import VMRecord, VMState, read_record
from pytest_smolvm.store import Store
from pytest_smolvm.vm import SmolVM


class JoinedVM(SmolVM):
    """What ``SmolVM.from_id`` returns for another process's VM."""

    def __init__(self, store: Store, record: VMRecord) -> None:
        key_path = Path(record.ssh_key_path) if record.ssh_key_path else None
        self._prepare(VMConfig.model_validate(record.config), store, record.ssh_user, key_path)
        self._found = record
        if record.ssh_host and record.ssh_port and self._config.offers_ssh:
            login = access.prepare_login(self._config, self._ssh_user, self._ssh_key_path, store)
            self._host_key = login.host_key
            self._guest = Guest(
                (record.ssh_host, record.ssh_port),
                login,
                self._check_usable,
                lambda: diagnosis.circumstances(record.machine_pid, self._console_path),
                Journal(None),
            )

    @property
    def status(self) -> VMState:
        record = read_record(self._store.vms / self.vm_id)
        return record.status if record else VMState.STOPPED

    def _ssh_address(self) -> tuple[str, int]:
        if not (self._found.ssh_host and self._found.ssh_port):
            raise SmolVMError(f"the VM {self.vm_id!r} has not booted yet")
        return self._found.ssh_host, self._found.ssh_port

    def _check_usable(self, grace_s: float) -> None:
        del grace_s  # it is the owner who sees the machine die
        if not self._store.is_owned(self.vm_id):
            raise VMNotFoundError(f"the VM {self.vm_id!r} is gone: its owner ended it")

    def _require_owner(self, what: str) -> None:
        raise SmolVMError(
            f"the VM {self.vm_id!r} belongs to process {self._found.owner_pid}: only that "
            f"process may {what}",
            {"owner_pid": self._found.owner_pid},
        )
