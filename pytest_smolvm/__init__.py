"""A virtual machine for every test; a library of small VMs under it.

The public names are loaded when they are first used: pytest imports this
package through its plugin in every run, and a run that asks for no VM pays
neither for pydantic nor for paramiko.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_smolvm.command import CommandResult
    from pytest_smolvm.config import DEFAULT_BOOT_ARGS, SSH_BOOT_ARGS, VMConfig
    from pytest_smolvm.errors import (
        BackendError,
        CommandExecutionUnavailableError,
        CommandFailedError,
        ImageError,
        OperationTimeoutError,
        SmolVMError,
        VMAlreadyExistsError,
        VMNotFoundError,
    )
    from pytest_smolvm.image_builder import ImageBuilder
    from pytest_smolvm.records import VMState
    from pytest_smolvm.templates import Template
    from pytest_smolvm.vm import SmolVM

_HOME = {
    "CommandResult": "command",
    "DEFAULT_BOOT_ARGS": "config",
    "SSH_BOOT_ARGS": "config",
    "VMConfig": "config",
    "BackendError": "errors",
    "CommandExecutionUnavailableError": "errors",
    "CommandFailedError": "errors",
    "ImageError": "errors",
    "OperationTimeoutError": "errors",
    "SmolVMError": "errors",
    "VMAlreadyExistsError": "errors",
    "VMNotFoundError": "errors",
    "ImageBuilder": "image_builder",
    "SmolVM": "vm",
    "Template": "templates",
    "VMState": "records",
}

__all__ = [
    "DEFAULT_BOOT_ARGS",
    "SSH_BOOT_ARGS",
    "BackendError",
    "CommandExecutionUnavailableError",
    "CommandFailedError",
    "CommandResult",
    "ImageBuilder",
    "ImageError",
    "OperationTimeoutError",
    "SmolVM",
    "SmolVMError",
    "Template",
    "VMAlreadyExistsError",
    "VMConfig",
    "VMNotFoundError",
    "VMState",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
