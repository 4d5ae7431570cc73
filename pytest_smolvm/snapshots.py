"""Saving a running machine so that others can start from there: memory, devices, disk."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from pytest_smolvm.backends.base import Backend, Machine, MachineSpec, MemoryFile
from pytest_smolvm.disks import Disk, Image, copy_sparsely, link_layer
from pytest_smolvm.process import Deadline, processor_time_s
from pytest_smolvm.rawdisks import copy_disk
from pytest_smolvm.statedir import make_private_dir, remove_tree

MEMORY, STATE, CONSOLE = "memory", "state", "console.log"
_QUIET_TIMEOUT_S = 2.0
_QUIET_WINDOW_S = 0.02
_QUIET_PART = 0.1
_QUIET_WINDOWS = 3


def wait_until_quiet(machine: Machine) -> None:
    """Wait until the guest hardly computes; one that never rests is saved as it is."""
    deadline = Deadline(_QUIET_TIMEOUT_S)
    quiet = 0
    while quiet < _QUIET_WINDOWS and not deadline.passed():
        before = processor_time_s(machine.pid)
        # Nothing tells of a guest's idleness but the time that it does not use.
        time.sleep(_QUIET_WINDOW_S)
        used = processor_time_s(machine.pid) - before
        quiet = quiet + 1 if used < _QUIET_WINDOW_S * _QUIET_PART else 0


def save(
    machine: Machine,
    spec: MachineSpec,
    backend: Backend,
    layers: Sequence[Path],
    name: str,
    target: Path,
    deadline: Deadline,
) -> list[str]:
    """Write what a running machine is into ``target``, and let it run on.

    Its disk becomes a layer called ``name`` there, with the disk's format for an ending, over
    links to ``layers``. Returns the names of all layers, the nearest first. The machine is paused
    meanwhile.
    """
    work = make_private_dir(target / "work")
    whole = work / "whole"
    layer = target / f"{name}.{spec.disk.image.format}"
    machine.pause()
    try:
        if backend.saves_memory_apart:
            machine.save(target / STATE, deadline, target / MEMORY)
        else:
            machine.save(whole, deadline)
        copy_disk(spec.disk.image.path, layer)
        copy_sparsely(spec.console, target / CONSOLE)
    finally:
        machine.resume()
    below = [link_layer(path, target) for path in layers]
    if not backend.saves_memory_apart:
        _split_off_memory(whole, spec, backend, [layer, *below], work, target, deadline)
    remove_tree(work)
    return [layer.name, *(path.name for path in below)]


def _split_off_memory(
    whole: Path,
    spec: MachineSpec,
    backend: Backend,
    layers: Sequence[Path],
    work: Path,
    target: Path,
    deadline: Deadline,
) -> None:
    """Turn a whole saved state into one without memory, and a file that can be mapped.

    A machine that never runs loads the one with its memory in the file, and is saved.
    """
    memory = target / MEMORY
    memory.touch(mode=0o600)
    nearest, *others = (Image(path, "qcow2") for path in layers)
    # What is under the layers is the root image, itself of layers perhaps.
    images = spec.disk.backing[len(others) :]
    converter = backend.launch(
        dataclasses.replace(
            spec,
            directory=work,
            disk=Disk(nearest, (*others, *images)),
            console=work / "console.log",
            machine_log=work / "machine.log",
            memory=MemoryFile(memory, shared=True),
            state=whole,
        ),
        deadline,
    )
    try:
        converter.save(target / STATE, deadline)
    finally:
        converter.kill()
