"""The command ``pytest-smolvm``: look after VMs that run, and after those that were kept.

Exit status: 0 done, 1 it failed, 2 it was called wrongly; ``ssh`` gives the
command's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from pytest_smolvm.cli_image import image
from pytest_smolvm.diagnosis import read_console
from pytest_smolvm.doctor import examine
from pytest_smolvm.errors import SmolVMError
from pytest_smolvm.images.cache import ImageCache
from pytest_smolvm.inventory import Entry, inventory
from pytest_smolvm.joined import JoinedVM
from pytest_smolvm.records import VMState
from pytest_smolvm.statedir import STATE_DIR_VARIABLE
from pytest_smolvm.store import Store
from pytest_smolvm.tables import duration, print_table
from pytest_smolvm.templates import Templates
from pytest_smolvm.terminal import harmless
from pytest_smolvm.vm import SmolVM

_WAY_IN_TIMEOUT_S = 60.0


class _Group(click.Group):
    """Shows our own errors as one message, and exits with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SmolVMError as error:
            raise click.ClickException(error.message) from error
        except ValidationError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the VMs' files lie (default: $SMOLVM_STATE_DIR, or the platform's place).",
)
@click.version_option(package_name="pytest-smolvm")
def main(state_dir: Path | None) -> None:
    """Look after the virtual machines of pytest-smolvm."""
    if state_dir is not None:
        os.environ[STATE_DIR_VARIABLE] = str(state_dir.absolute())


main.add_command(image)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def ps(as_json: bool) -> None:
    """List the VMs that run, and those that were kept."""
    entries = inventory(Store())
    if as_json:
        click.echo(json.dumps([_facts(entry) for entry in entries], indent=1))
        return
    if not entries:
        click.echo("There are no VMs.")
        return
    rows = [("VM", "STATE", "AGE", "SIZE", "OWNER", "TEST")]
    rows += [
        (
            entry.vm_id,
            _state(entry),
            duration(entry.age_s),
            f"{entry.size_bytes / (1 << 20):.1f} MiB",
            str(entry.record.owner_pid) if entry.live else "-",
            harmless(entry.record.usage.test) or "-",
        )
        for entry in entries
    ]
    print_table(rows)


# What stands after the VM is the guest's command, options and all.
@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("vm_id", metavar="VM")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def ssh(vm_id: str, command: tuple[str, ...]) -> None:
    """Get into a VM, or run COMMAND in it.

    One that runs is joined. One that was kept is booted from its disk, for as
    long as the shell lasts, and kept again, with what was changed in it.
    """
    if shutil.which("ssh") is None:
        raise SmolVMError("'ssh' is not installed; on Debian: apt-get install openssh-client")
    vm = SmolVM.from_id(vm_id)
    if isinstance(vm, JoinedVM):
        if vm.status is VMState.PAUSED:
            raise SmolVMError(f"the VM {vm_id!r} is paused by its owner: it cannot answer")
        sys.exit(_run_ssh(vm, command))
    with _ended_by_signals():
        click.echo(f"booting {vm_id} from its disk", err=True)
        # Leaving the block keeps it again: it was kept before.
        with vm:
            status = _run_ssh(vm, command)
    sys.exit(status)


@main.command()
@click.argument("vm_id", metavar="VM")
@click.option("--commands", is_flag=True, help="The commands that were run in it instead.")
@click.option("--machine", is_flag=True, help="What the emulator itself printed instead.")
def logs(vm_id: str, commands: bool, machine: bool) -> None:
    """Print a VM's console, made harmless for terminals."""
    if commands and machine:
        raise click.UsageError("give --commands or --machine, not both")
    path = Store().find(vm_id)
    name = "commands" if commands else "machine" if machine else "console"
    suffix = ".jsonl" if commands else ".log"
    text = ""
    if commands:
        text = read_console(path / f"{name}.1{suffix}")
    text += read_console(path / f"{name}{suffix}")
    click.echo(text.rstrip("\n") if commands else harmless(text).rstrip("\n"))


@main.command()
@click.argument("vm_ids", metavar="VM...", nargs=-1, required=True)
def rm(vm_ids: tuple[str, ...]) -> None:
    """Remove VMs that were kept, disks and all. One that runs is refused."""
    store = Store()
    for vm_id in vm_ids:
        store.find(vm_id)  # all of them, before any is removed
    for vm_id in vm_ids:
        store.remove(vm_id)


@main.command()
@click.option("--kept", is_flag=True, help="Also what was kept to be looked at.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def gc(kept: bool, as_json: bool) -> None:
    """Remove what dead owners left behind, and templates that nobody has used for long.

    What was kept stays, unless --kept is given; disks that a configuration asked to
    keep (retain_disk_on_delete) stay in any case.
    """
    store = Store()
    removed = store.sweep() + Templates(store).sweep() + ImageCache(store.images).sweep()
    if kept:
        for entry in inventory(store):
            if entry.record.retained and not entry.record.keep_disk and not entry.live:
                store.remove(entry.vm_id)
                removed.append(entry.vm_id)
    if as_json:
        click.echo(json.dumps({"removed": removed}))
    else:
        click.echo(f"removed: {', '.join(removed) or 'nothing'}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def doctor(as_json: bool) -> None:
    """Check all that a run needs of this host: what is wrong, what it costs, what mends it.

    Exit status 1: no VM can run here.
    """
    findings = list(examine())
    can_run = all(finding.grade != "problem" for finding in findings)
    if as_json:
        told = [asdict(finding) for finding in findings]
        click.echo(json.dumps({"can_run": can_run, "findings": told}, indent=1))
    else:
        for finding in findings:
            click.echo(f"{finding.grade:8}{finding.subject}: {harmless(finding.text)}")
            for name, text in (("costs", finding.cost), ("mend", finding.remedy)):
                if text:
                    click.echo(f"        {name}: {text}")
        click.echo("VMs can run here." if can_run else "No VM can run here: see the problems.")
    sys.exit(0 if can_run else 1)


def _run_ssh(vm: SmolVM, command: tuple[str, ...]) -> int:
    # A guest that has just booted may still have our own attempts to get in before it, and turns
    # others away meanwhile: ssh would not try again.
    vm.wait_for_ssh(_WAY_IN_TIMEOUT_S)
    argv = shlex.split(vm.ssh_commands()["ssh"])
    if not command:
        argv.insert(1, "-t")
    return subprocess.run([*argv, *command], check=False).returncode


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A terminal that is closed, or a kill, is a reason to keep the VM properly, too."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before: list[tuple[int, Callable[..., Any] | int | None]] = [
        (number, signal.signal(number, leave)) for number in (signal.SIGTERM, signal.SIGHUP)
    ]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _facts(entry: Entry) -> dict[str, Any]:
    record, retained = entry.record, entry.record.retained
    return {
        "vm_id": entry.vm_id,
        "state": _state(entry),
        "live": entry.live,
        "test": record.usage.test,
        "project": record.usage.project,
        "session": record.usage.session,
        "kept_because": retained.reason if retained else None,
        "age_s": round(entry.age_s, 1),
        "size_bytes": entry.size_bytes,
        "owner_pid": record.owner_pid if entry.live else None,
        "directory": str(entry.path),
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created_at)),
    }


def _state(entry: Entry) -> str:
    if entry.live:
        return str(entry.record.status)
    return "kept" if entry.record.is_kept else "left behind"
