"""VMConfig: what a virtual machine is, validated and frozen."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pytest_smolvm.limits import (
    DEFAULT_MEM_SIZE_MIB,
    DEFAULT_VCPU_COUNT,
    MEM_SIZE_MIB,
    VCPU_COUNT,
)
from pytest_smolvm.paths import is_file

DEFAULT_BOOT_ARGS = "console=ttyS0 reboot=k panic=1 pci=off"
"""The boot arguments of a VM that asks for none: it boots the image's own init."""

SSH_BOOT_ARGS = f"{DEFAULT_BOOT_ARGS} root=/dev/vda rw init=/init"
"""Boot arguments for images that this library builds: their ``/init`` starts SSH."""

BackendName = Literal["auto", "qemu", "firecracker"]
DiskMode = Literal["isolated", "shared"]
Network = Literal["isolated", "nat"]

_VM_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")
_ENV_KEY = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


def generate_vm_id() -> str:
    """A new id of the form ``vm-`` and 8 hexadecimal digits."""
    return f"vm-{secrets.token_hex(4)}"


def check_vm_id(value: str) -> str:
    """``value``, if it is a valid VM id; else ``ValueError`` says what one looks like."""
    if not _VM_ID.fullmatch(value):
        raise ValueError(
            f"vm_id {value!r} is not valid: use 1 to 64 lowercase letters, digits and hyphens, "
            "with a letter or a digit first and last, such as 'web-server-1'"
        )
    return value


def check_env_vars(value: Mapping[str, str]) -> dict[str, str]:
    """A copy of ``value``, if a guest's environment can hold it; else ``ValueError``."""
    for key, text in value.items():
        if not _ENV_KEY.fullmatch(key):
            raise ValueError(
                f"environment variable name {key!r} is not valid: it must start with a letter "
                "or an underscore and hold only letters, digits and underscores, such as "
                "'API_KEY'"
            )
        if "\0" in text:
            raise ValueError(
                f"the value of environment variable {key!r} holds a NUL character, which no "
                "environment can carry: remove it, or pass the data in a file"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the value of environment variable {key!r} cannot be written as UTF-8 "
                f"({error.reason}): pass the data in a file"
            ) from None
    return dict(value)


def _check_file(path: Path, what: str) -> Path:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ValueError(f"{what} {str(path)!r} does not exist: give the path of a file") from None
    except OSError as error:
        raise ValueError(
            f"{what} {str(path)!r} cannot be looked at: {error.strerror or error}"
        ) from None
    if stat.S_ISDIR(mode):
        raise ValueError(f"{what} {str(path)!r} is a directory: give the path of a file")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{what} {str(path)!r} is not a regular file: give the path of a file")
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ValueError(f"{what} {str(path)!r} may not be read by this user: chmod u+r it")
    return path


class VMConfig(BaseModel):
    """What one virtual machine is: frozen, and valid from the moment it exists.

    A changed copy comes from ``config.model_copy(update={...})``. Unknown
    fields, values out of range and paths that name no file are pydantic's
    ``ValidationError``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    vm_id: str = Field(default_factory=generate_vm_id)
    """Unique among the VMs of this host; None or left out: ``vm-<8 hex digits>``."""

    vcpu_count: Annotated[int, Field(ge=VCPU_COUNT[0], le=VCPU_COUNT[1])] = DEFAULT_VCPU_COUNT
    """Virtual CPUs, 1 to 32."""

    mem_size_mib: Annotated[int, Field(ge=MEM_SIZE_MIB[0], le=MEM_SIZE_MIB[1])] = (
        DEFAULT_MEM_SIZE_MIB
    )
    """Memory in MiB, 128 to 16384."""

    kernel_path: Path
    """The kernel: an uncompressed ``vmlinux`` boots everywhere, a bzImage on QEMU."""

    rootfs_path: Path
    """The image of the root file system: raw, or qcow2 without a backing file (QEMU)."""

    boot_args: str = DEFAULT_BOOT_ARGS
    """What kind of boot is wanted; the backend settles the kernel's real command line.

    With ``init=/init`` in it, the guest is expected to answer SSH.
    """

    backend: BackendName | None = None
    """``qemu``, ``firecracker``; None or ``auto``: whichever works on this host."""

    disk_mode: DiskMode = "isolated"
    """``isolated``: a disk of its own over the untouched image. ``shared``: the image
    itself, read-only, for as many VMs at once as want it."""

    retain_disk_on_delete: bool = False
    """Keep the isolated disk after ``delete()``, for a later VM of the same id."""

    env_vars: dict[str, str] = Field(default_factory=dict)
    """Environment variables for login shells in the guest (needs ``init=/init``)."""

    initrd_path: Path | None = None
    """The initial RAM disk; None: ``<kernel file name>.initrd`` beside the kernel, if
    there is one."""

    network: Network = "isolated"
    """``isolated``: the guest reaches nothing, the host reaches the guest.
    ``nat``: the guest may go out as well, though never to the host's own services."""

    @field_validator("vm_id", mode="before")
    @classmethod
    def _generate_missing_id(cls, value: Any) -> Any:
        return generate_vm_id() if value is None else value

    @field_validator("vm_id")
    @classmethod
    def _check_vm_id(cls, value: str) -> str:
        return check_vm_id(value)

    @field_validator("vcpu_count", "mem_size_mib", mode="before")
    @classmethod
    def _refuse_bool(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(f"{value!r} is not a number: give a whole number")
        return value

    @field_validator("kernel_path")
    @classmethod
    def _check_kernel(cls, value: Path) -> Path:
        return _check_file(value, "kernel_path")

    @field_validator("rootfs_path")
    @classmethod
    def _check_rootfs(cls, value: Path) -> Path:
        return _check_file(value, "rootfs_path")

    @field_validator("initrd_path")
    @classmethod
    def _check_initrd(cls, value: Path | None) -> Path | None:
        return None if value is None else _check_file(value, "initrd_path")

    @field_validator("env_vars")
    @classmethod
    def _check_env_vars(cls, value: dict[str, str]) -> dict[str, str]:
        return check_env_vars(value)

    def effective_initrd_path(self) -> Path | None:
        """The initial RAM disk that a boot really uses: the given one, or the kernel's."""
        if self.initrd_path is not None:
            return self.initrd_path
        beside = self.kernel_path.with_name(f"{self.kernel_path.name}.initrd")
        return beside if is_file(beside) else None

    @property
    def offers_ssh(self) -> bool:
        """Whether the guest is expected to answer SSH: its boot arguments say ``init=/init``."""
        return "init=/init" in self.boot_args.split()
