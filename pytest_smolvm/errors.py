"""Every error that pytest-smolvm raises on purpose, in one tree.

::

    SmolVMError
    ├── VMNotFoundError                    no VM, live or kept, has that id
    ├── VMAlreadyExistsError               that id is taken
    ├── ImageError                         an image cannot be built, found or used
    ├── BackendError                       nothing can boot a guest, or a machine died
    ├── OperationTimeoutError              a deadline passed
    ├── CommandFailedError                 ``check`` met a non-zero exit status
    └── CommandExecutionUnavailableError   the guest offers no way to run commands

Bad configuration is not here: it is pydantic's ``ValidationError``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_smolvm.terminal import harmless

if TYPE_CHECKING:
    from pytest_smolvm.command import CommandResult


class SmolVMError(Exception):
    """Base of all errors of this library.

    ``message`` says what was wrong, which value, and what to do next;
    ``details`` holds the same facts for programs.
    """

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        # It may quote what a guest sent.
        message = harmless(message)
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = dict(details or {})


class VMNotFoundError(SmolVMError):
    """No live VM and no kept disk goes by the given id."""


class VMAlreadyExistsError(SmolVMError):
    """Another live VM on this host already goes by the given id."""


class ImageError(SmolVMError):
    """An image cannot be built, found, read or used."""


class BackendError(SmolVMError):
    """Nothing here can boot the guest, or the machine died.

    ``exit_status`` is the emulator's (negative: killed by that signal; None:
    it was never started), ``command_line`` what was started, ``console_tail``
    the last lines that the guest wrote to its console.
    """

    def __init__(
        self,
        message: str,
        details: Mapping[str, Any] | None = None,
        *,
        exit_status: int | None = None,
        command_line: Sequence[str] = (),
        console_tail: str = "",
    ) -> None:
        super().__init__(message, details)
        self.exit_status = exit_status
        self.command_line = list(command_line)
        self.console_tail = console_tail


class OperationTimeoutError(SmolVMError):
    """``operation`` was not done within ``timeout_s`` seconds.

    For a command, ``stdout`` and ``stderr`` are what it had printed by then.
    """

    def __init__(
        self,
        operation: str,
        timeout_s: float,
        message: str = "",
        details: Mapping[str, Any] | None = None,
        *,
        stdout: str = "",
        stderr: str = "",
    ) -> None:
        text = f"{operation} was not done within {timeout_s:g} s"
        super().__init__(f"{text}: {message}" if message else text, details)
        self.operation = operation
        self.timeout_s = timeout_s
        self.reason = message
        self.stdout = stdout
        self.stderr = stderr


class CommandFailedError(SmolVMError):
    """A command in the guest ended with an exit status other than 0."""

    def __init__(self, result: CommandResult) -> None:
        super().__init__(result.describe(), {"exit_code": result.exit_code})
        self.result = result


class CommandExecutionUnavailableError(SmolVMError):
    """Commands cannot be run in this guest: ``reason``; ``remediation`` helps."""

    def __init__(
        self, reason: str, remediation: str, details: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(f"{reason} {remediation}", details)
        self.reason = reason
        self.remediation = remediation
