"""What a VM's owner can do inside it: commands, files, variables, waits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from pytest_smolvm.booting import BOOT_TIMEOUT_S
from pytest_smolvm.command import CommandResult, Shell
from pytest_smolvm.errors import SmolVMError
from pytest_smolvm.guest import DEFAULT_COMMAND_TIMEOUT_S, TRANSFER_TIMEOUT_S, Guest
from pytest_smolvm.process import Deadline


def check_port(port: int, what: str) -> None:
    """Raise ``SmolVMError`` unless ``port`` is a TCP port."""
    if not 1 <= port <= 65535:
        raise SmolVMError(f"{what}={port!r} is not a TCP port: give 1 to 65535")


class Inside(ABC):
    """The half of ``SmolVM`` that works through the guest's SSH server."""

    @abstractmethod
    def _live_guest(self) -> Guest:
        """The guest, or an error that says why it cannot be talked to."""

    def wait_for_ssh(self, timeout: float = BOOT_TIMEOUT_S) -> Self:
        """Wait until the guest lets us in anew, for at most ``timeout`` seconds."""
        self._live_guest().connect(Deadline(timeout), is_up=True)
        return self

    def answers(self, timeout: float = 10.0) -> bool:
        """Whether the guest runs a command within ``timeout`` seconds."""
        try:
            return self._live_guest().ask("true", timeout).ok
        except SmolVMError:
            return False

    def run(
        self,
        command: str | Sequence[str],
        timeout: float = DEFAULT_COMMAND_TIMEOUT_S,
        *,
        shell: Shell = "login",
        check: bool = False,
        input: str | bytes | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        on_output: Callable[[bytes], object] | None = None,
    ) -> CommandResult:
        """Run a command in the guest, to its end.

        ``command``: text for the guest's shell, or a list of arguments, quoted for
        it. ``timeout``: seconds for the whole command; past it the command is
        killed in the guest, and ``OperationTimeoutError`` carries what it had
        printed. ``shell``: ``"login"`` reads the profile first, ``"raw"`` does not.
        ``input``: standard input (default: empty). ``cwd``, ``env``: for this
        command alone. ``on_output`` is called with what the command prints, on
        either stream, as it comes. ``check``: raise ``CommandFailedError`` for an exit status
        other than 0.
        """
        return self._live_guest().run(
            command,
            timeout,
            shell=shell,
            check=check,
            input=input,
            cwd=cwd,
            env=env,
            on_output=on_output,
        )

    def put(self, local: str | Path, remote: str, timeout: float = TRANSFER_TIMEOUT_S) -> None:
        """Copy from the host to the guest, with modes; everything becomes root's.

        A file becomes ``remote``, or goes into it if that is a directory or ends
        with a slash. The contents of a directory become those of ``remote``, beside
        what is there. Missing directories are made.
        """
        self._live_guest().put(local, remote, timeout)

    def get(self, remote: str, local: str | Path, timeout: float = TRANSFER_TIMEOUT_S) -> None:
        """Copy from the guest to the host, with modes, by the same rules as ``put``.

        Nothing is written outside ``local``, whatever the guest sends; devices
        and the like are left out.
        """
        self._live_guest().get(remote, local, timeout)

    def read_text(self, path: str) -> str:
        """The contents of a text file (UTF-8) in the guest."""
        return self._live_guest().read_text(path)

    def write_text(self, path: str, text: str) -> None:
        """Write a text file (UTF-8) in the guest; missing directories are made."""
        self._live_guest().write_text(path, text)

    def set_env_vars(self, variables: Mapping[str, str], *, merge: bool = True) -> list[str]:
        """Set environment variables for login shells; returns all names now set, sorted.

        ``merge=False`` drops those set before.
        """
        return self._live_guest().set_env_vars(variables, merge=merge)

    def unset_env_vars(self, keys: Sequence[str]) -> dict[str, str]:
        """Remove variables; returns those that were set, with their values."""
        return self._live_guest().unset_env_vars(keys)

    def list_env_vars(self) -> dict[str, str]:
        """The variables set by this library."""
        return self._live_guest().list_env_vars()

    def wait_until(self, command: str | Sequence[str], timeout: float = 30.0) -> CommandResult:
        """Run ``command`` again and again until it succeeds; returns that result.

        Past ``timeout`` seconds ``OperationTimeoutError`` shows the last try.
        """
        return self._live_guest().wait_until(command, timeout)

    def wait_for_port(self, guest_port: int, timeout: float = 30.0) -> Self:
        """Wait until something listens on the TCP port in the guest."""
        check_port(guest_port, "guest_port")
        self._live_guest().wait_for_port(guest_port, timeout)
        return self
