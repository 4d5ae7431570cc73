"""What a failing test's report says of its VMs."""

from __future__ import annotations

from pytest_smolvm.diagnosis import last_lines
from pytest_smolvm.journal import Entry
from pytest_smolvm.terminal import harmless, short_lines
from pytest_smolvm.vm import SmolVM

_COMMANDS_SHOWN = 5
_LINES_SHOWN = 10


def sections_of(vm: SmolVM, shown: str = "") -> list[tuple[str, str]]:
    """Titles and texts: the console's end, the last commands, where the time went.

    ``shown`` is what the report shows already: an error that tells of a machine's
    death has the console in it. A VM that never got as far as starting has none.
    """
    if not vm.timings:
        return []
    console = last_lines(vm.console)
    lines = console.splitlines()
    sections = []
    if not lines or any(line not in shown for line in lines[-_LINES_SHOWN:]):
        title = f"console of {vm.vm_id} (last {len(lines)} lines)"
        sections.append((title, console or "(nothing)"))
    commands = vm.commands[-_COMMANDS_SHOWN:]
    if commands:
        text = "\n".join(_describe(entry) for entry in commands)
        sections.append((f"last commands in {vm.vm_id}", text))
    sections.append((f"where the time of {vm.vm_id} went", _timings(vm)))
    return sections


def _describe(entry: Entry) -> str:
    came_of_it = f"exit status {entry.exit_code}" if entry.exit_code is not None else entry.error
    tries = f", {entry.tries} tries" if entry.tries > 1 else ""
    text = f"$ {harmless(entry.command)}\n[{harmless(came_of_it)}, {entry.duration_s:.2f} s{tries}]"
    for name, output in (("", entry.stdout), ("stderr: ", entry.stderr)):
        lines = short_lines(harmless(output).strip())
        if len(lines) > _LINES_SHOWN:
            lines = [f"[... {len(lines) - _LINES_SHOWN} lines]", *lines[-_LINES_SHOWN:]]
        text += "".join(f"\n  {name}{line}" for line in lines)
    return text


def _timings(vm: SmolVM) -> str:
    parts = [f"{phase} {took:.2f} s" for phase, took in vm.timings.items()]
    commands = vm.commands
    if commands:
        took = sum(entry.duration_s for entry in commands)
        parts.append(f"commands ({len(commands)}) {took:.2f} s")
    return ", ".join(parts)
