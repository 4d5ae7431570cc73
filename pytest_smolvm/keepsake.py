"""The text that goes with a kept VM directory, so that it explains itself."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from pytest_smolvm.records import VMRecord
from pytest_smolvm.statedir import platform_state_dir

README_NAME = "README.txt"

_FILES = (
    ("vm.json", "its configuration, and what is known of it"),
    ("disk.qcow2", "its disk: a qcow2 overlay on the image that it was made from"),
    ("disk.raw", "its disk: all of it, whatever image it was made from"),
    ("layer-*.qcow2", "what its disk lies over: the disks of the guests that it began with"),
    ("console.log", "what it wrote to its console"),
    ("console.1.log", "the same, of the boot before"),
    ("commands.jsonl", "the commands that were run in it: exit codes, times, output"),
    ("commands.1.jsonl", "the same, older ones"),
    ("machine.log", "what the emulator itself printed"),
    ("firecracker.log", "what Firecracker logged"),
    ("firecracker.metrics", "what Firecracker counted, as JSON"),
)


def command_line(state_dir: Path, *words: str) -> str:
    """A line for a person's terminal, which works whatever their environment says."""
    options = [] if state_dir == platform_state_dir() else ["--state-dir", str(state_dir)]
    return shlex.join(["pytest-smolvm", *options, *words])


def readme(record: VMRecord, directory: Path) -> str:
    """What ``README.txt`` in a kept directory says."""
    state_dir = directory.parent.parent
    facts = [("virtual machine", record.vm_id)]
    if record.usage.test:
        facts.append(("test", record.usage.test))
    if record.usage.project:
        facts.append(("project", record.usage.project))
    if record.retained is not None:
        facts.append(("kept because", record.retained.reason))
        facts.append(("kept at", _moment(record.retained.at)))
        if record.retained.without_disk:
            facts.append(("no disk", record.retained.without_disk))
    elif record.keep_disk:
        facts.append(("kept because", "its configuration says retain_disk_on_delete=True"))
    machine = [f"{record.config.get('mem_size_mib')} MiB"]
    if record.backend:
        machine.insert(0, f"{record.backend} ({record.accelerator})")
    facts.append(("machine", ", ".join(machine)))
    facts.append(("image", str(record.config.get("rootfs_path"))))
    lines = ["This virtual machine was kept by pytest-smolvm.", ""]
    lines += [f"  {name:<16}{value}" for name, value in facts]
    lines += ["", "To get back in (it boots from the disk below, which is kept again):", ""]
    lines += [f"  {command_line(state_dir, 'ssh', record.vm_id)}", ""]
    lines += ["To be rid of it:", "", f"  {command_line(state_dir, 'rm', record.vm_id)}", ""]
    lines += ["What lies here:", ""]
    lines += [f"  {name:<18}{what}" for name, what in _FILES if any(directory.glob(name))]
    return "\n".join(lines) + "\n"


def _moment(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
