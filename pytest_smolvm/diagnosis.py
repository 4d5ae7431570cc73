"""Why a machine is not there (any more), in words that a person can act on."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from pytest_smolvm.backends.base import Machine, MachineEnd
from pytest_smolvm.errors import BackendError, OperationTimeoutError
from pytest_smolvm.terminal import harmless, short_lines

CONSOLE_TAIL_LINES = 30
_TAIL_BYTES = 64 << 10
_LINES_SEARCHED = 150
_LINES_BEFORE_COMPLAINT = 8
_COMPLAINTS = ("Kernel panic", "Oops:", "BUG:", "Out of memory")


def read_console(path: Path) -> str:
    """All that the guest has written to its console."""
    try:
        return path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return ""


def console_tail(path: Path) -> str:
    """The last lines of the console that matter, made harmless."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return last_lines(text)


def last_lines(text: str) -> str:
    """The last lines of a console's text, made harmless.

    As many as make a screen, or more, so as to start a little before the kernel
    first complained: a panic's register dump would else hide its reason.
    """
    lines = short_lines(harmless(text).strip())
    start = len(lines) - CONSOLE_TAIL_LINES
    recent = max(0, len(lines) - _LINES_SEARCHED)
    for number in range(recent, len(lines)):
        if any(word in lines[number] for word in _COMPLAINTS):
            start = min(start, number - _LINES_BEFORE_COMPLAINT)
            break
    return "\n".join(lines[max(0, start) :])


def _console_section(console: str) -> str:
    return f"\n--- last lines of the console ---\n{console}" if console else "\n(no console output)"


_STATES = {
    "T": "is stopped by a signal (kill -CONT {pid} lets it go on)",
    "t": "is stopped by a debugger",
    "D": "waits in the host's kernel, most likely for its disk",
    "Z": "has ended",
}
"""What the third field of /proc/PID/stat may be that explains a silence: proc_pid_stat(5)."""


def circumstances(pid: int | None, console: Path) -> str:
    """What may explain that a machine does not answer: its process's state, its console."""
    return f"{_process_state(pid)}{_console_section(console_tail(console))}"


def _process_state(pid: int | None) -> str:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    said = _STATES.get(fields[0])
    return f"\nits process {pid} {said.format(pid=pid)}" if said else ""


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
        why = f"{end.emulator} was killed by signal {-end.exit_status}"
    else:
        why = f"{end.emulator} ended"
    said = f"\n--- {end.emulator} said ---\n{end.output}" if end.output else ""
    return BackendError(
        f"the VM {vm_id!r} died {during}: {why} (exit status {end.exit_status}){said}\n"
        f"command line: {shlex.join(end.command_line)}{_console_section(tail)}",
        {"vm_id": vm_id, "reason": end.reason, "output": end.output},
        exit_status=end.exit_status,
        command_line=end.command_line,
        console_tail=tail,
    )


def stalled(vm_id: str, why: str, directory: Path) -> BackendError:
    """The error for a machine that stands still since the host cannot do what it asks for."""
    return BackendError(
        f"the VM {vm_id!r} stands still: the host could not do what its disk was asked to ({why}). "
        f"Is there room left on the disk with {directory}? Once there is, resume() lets the VM go "
        "on as if nothing had happened",
        {"vm_id": vm_id, "reason": why, "directory": str(directory)},
        console_tail=console_tail(directory / "console.log"),
    )


def never_answered(
    vm_id: str, error: OperationTimeoutError, machine: Machine, console: Path
) -> OperationTimeoutError:
    """The error for a guest that runs but does not answer."""
    command_line = machine.command_line
    return OperationTimeoutError(
        error.operation,
        error.timeout_s,
        f"the VM {vm_id!r} runs but does not answer ({error.message}). If it only needs longer, "
        "give a longer boot_timeout; if its image has no SSH server, it cannot be used this way.\n"
        f"command line: {shlex.join(command_line)}{circumstances(machine.pid, console)}",
        {"vm_id": vm_id, "console_tail": console_tail(console), "command_line": command_line},
    )
