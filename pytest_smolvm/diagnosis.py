"""Why a machine is not there (any more), in words that a person can act on."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from pytest_smolvm.backends.base import MachineEnd
from pytest_smolvm.errors import BackendError, OperationTimeoutError

CONSOLE_TAIL_LINES = 30
_TAIL_BYTES = 64 << 10

# Terminal escape sequences (ECMA-48) and other control characters: what a guest
# prints must not drive the terminal of whoever reads the report.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_CONTROLS = re.compile(r"[^\t\n\x20-\x7e\xa0-\U0010ffff]")


def harmless(text: str) -> str:
    """``text`` without what could drive a terminal."""
    text = _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def read_console(path: Path) -> str:
    """All that the guest has written to its console."""
    try:
        return path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return ""


def console_tail(path: Path, lines: int = CONSOLE_TAIL_LINES) -> str:
    """The last lines of the console, made harmless."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(harmless(text).strip().splitlines()[-lines:])


def _console_section(console: str) -> str:
    return f"\n--- last lines of the console ---\n{console}" if console else "\n(no console output)"


def died(vm_id: str, during: str, end: MachineEnd, console: Path) -> BackendError:
    """The error for a machine that ended by itself."""
    tail = console_tail(console)
    if "Kernel panic" in tail:
        why = "the guest's kernel panicked"
    elif end.reason == "guest-reset":
        why = "the guest reset itself"
    elif end.reason == "guest-shutdown":
        why = "the guest switched itself off"
    elif end.exit_status < 0:
        why = f"QEMU was killed by signal {-end.exit_status}"
    else:
        why = "QEMU ended"
    said = f"\n--- QEMU said ---\n{end.output}" if end.output else ""
    return BackendError(
        f"the VM {vm_id!r} died {during}: {why} (exit status {end.exit_status}){said}\n"
        f"command line: {shlex.join(end.command_line)}{_console_section(tail)}",
        {"vm_id": vm_id, "reason": end.reason, "output": end.output},
        exit_status=end.exit_status,
        command_line=end.command_line,
        console_tail=tail,
    )


def never_answered(
    vm_id: str, error: OperationTimeoutError, command_line: list[str], console: Path
) -> OperationTimeoutError:
    """The error for a guest that runs but does not answer."""
    tail = console_tail(console)
    return OperationTimeoutError(
        error.operation,
        error.timeout_s,
        f"the VM {vm_id!r} runs but does not answer ({error.message}). If it only needs longer, "
        "give a longer boot_timeout; if its image has no SSH server, it cannot be used this way.\n"
        f"command line: {shlex.join(command_line)}{_console_section(tail)}",
        {"vm_id": vm_id, "console_tail": tail, "command_line": command_line},
    )
