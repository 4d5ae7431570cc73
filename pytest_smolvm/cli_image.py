"""The command ``pytest-smolvm image``: what images there are; make them, remove them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from pytest_smolvm import sharing
from pytest_smolvm.image_builder import ImageBuilder
from pytest_smolvm.images import shelf
from pytest_smolvm.images.builder import paths_in, print_progress
from pytest_smolvm.images.projects import find_project
from pytest_smolvm.images.shelf import ShelvedImage
from pytest_smolvm.limits import ARCHITECTURES
from pytest_smolvm.store import Store
from pytest_smolvm.tables import duration, print_table
from pytest_smolvm.terminal import harmless

_MIB = 1 << 20


@click.group()
def image() -> None:
    """Look after the images that VMs boot from."""


@image.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def list_images(as_json: bool) -> None:
    """List the images that were built, with what uses them."""
    found = _shelf()
    if as_json:
        click.echo(json.dumps([_facts(entry) for entry in found], indent=1))
        return
    if not found:
        click.echo("There are no images: they are built when they are first asked for.")
        return
    rows = [("IMAGE", "AGE", "UNUSED", "SIZE", "OWN", "USED BY", "MADE FROM")]
    rows += [
        (
            entry.key,
            duration(entry.age_s),
            duration(entry.unused_s),
            f"{entry.size_bytes / _MIB:.0f} MiB",
            f"{entry.own_bytes / _MIB:.0f} MiB",
            ",".join(entry.used_by) or "-",
            harmless(entry.facts.origin) or "-",
        )
        for entry in found
    ]
    print_table(rows)


_ARCH = click.option("--arch", type=click.Choice(ARCHITECTURES), help="For which processor.")


@image.command()
@click.argument("name")
@_ARCH
@click.option("--progress", is_flag=True, help="Show what a recipe's commands print, as they run.")
@click.option("--keep-failed", is_flag=True, help="Keep the VM of a step that failed, for ssh.")
def build(name: str, arch: str | None, progress: bool, keep_failed: bool) -> None:
    """Build the image NAME, built in or of this project, unless it is there; print its paths."""

    def show(data: bytes) -> None:
        sys.stderr.write(harmless(data.decode(errors="replace")))
        sys.stderr.flush()

    builder = ImageBuilder(
        project=find_project(Path.cwd()),
        on_output=show if progress else bytes,
        keep_failed=keep_failed,
    )
    kernel, rootfs = builder.build(name, arch=arch)
    click.echo(f"kernel: {kernel}\nroot disk: {rootfs}")


@image.command()
@click.argument("name")
@_ARCH
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="Where to [NAME.smolvm]."
)
@click.option("--no-templates", is_flag=True, help="Without guests that have booted.")
def export(name: str, arch: str | None, output: Path | None, no_templates: bool) -> None:
    """Write the image NAME into one file, for other machines, with a guest that has booted.

    It is built first, if need be. The file holds the key that its guests let in.
    """
    chosen = [entry for entry in _shelf() if entry.key == name]
    if chosen:
        rootfs = paths_in(chosen[0].path)[1]
    else:
        _, rootfs = ImageBuilder(project=find_project(Path.cwd())).build(name, arch=arch)
    target = output or Path(f"{name}.smolvm")
    done = sharing.export_image(rootfs, target, Store(), print_progress, templates=not no_templates)
    click.echo(f"{target}: {done.image.name}, with {done.templates} booted")


@image.command("import")
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
def import_(path: Path) -> None:
    """Read an image that was exported; its name stands for it from then on."""
    done = sharing.import_image(path, Store(), print_progress)
    click.echo(f"{done.facts.name}: {done.image.name}, with {done.templates} booted")


@image.command()
@click.argument("names", metavar="IMAGE...", nargs=-1, required=True)
def rm(names: tuple[str, ...]) -> None:
    """Remove images, by name (all of that name) or by what the list calls them.

    One that a VM uses, live or kept, is refused.
    """
    images = _shelf()
    # All of them are there, and free to go, before any is removed.
    chosen = {entry.path: entry for name in names for entry in shelf.find(images, name)}
    for entry in sorted(chosen.values(), key=lambda entry: not entry.used_by):
        shelf.remove(entry)


@image.command()
@click.option("--keep-days", type=click.FloatRange(min=0), default=30.0, show_default=True)
@click.option("--max-mib", type=click.IntRange(min=0), help="Keep no more than that.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def prune(keep_days: float, max_mib: int | None, as_json: bool) -> None:
    """Remove images that nobody asked for in a while, and the longest unused of too many.

    Those that a VM uses, live or kept, stay.
    """
    gone = shelf.to_prune(_shelf(), keep_days, None if max_mib is None else max_mib * _MIB)
    for entry in gone:
        shelf.remove(entry)
    names = [entry.key for entry in gone]
    click.echo(
        json.dumps({"removed": names}) if as_json else f"removed: {', '.join(names) or 'nothing'}"
    )


def _shelf() -> list[ShelvedImage]:
    store = Store()
    return shelf.shelf(store.images, store)


def _facts(entry: ShelvedImage) -> dict[str, Any]:
    return {
        "key": entry.key,
        **entry.facts.model_dump(),
        "age_s": round(entry.age_s, 1),
        "unused_s": round(entry.unused_s, 1),
        "size_bytes": entry.size_bytes,
        "own_bytes": entry.own_bytes,
        "used_by": entry.used_by,
        "directory": str(entry.path),
    }
