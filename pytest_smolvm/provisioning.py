"""What a recipe does in a guest, a step at a time; each step's disk becomes a layer of an image."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pytest_smolvm.config import SSH_BOOT_ARGS, VMConfig
from pytest_smolvm.disks import (
    chain_of,
    link_layer,
    note_digests,
    noted_digests,
    write_list_of_layers,
)
from pytest_smolvm.errors import ImageError, SmolVMError
from pytest_smolvm.images.builder import LAYERED_ROOTFS
from pytest_smolvm.images.cache import Progress
from pytest_smolvm.images.manifest import read_manifest, write_manifest
from pytest_smolvm.terminal import harmless
from pytest_smolvm.vm import SmolVM

STEP_TIMEOUT_S = 3600.0
LOG = "build.log"

_MEM_SIZE_MIB = 1024
_SHOWN_CHARS = 4000
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")

# What is left behind but of no use in an image, and what must not be the same in all guests.
_TIDY = """
[ ! -s /etc/machine-id ] || : > /etc/machine-id
if command -v apt-get > /dev/null; then apt-get clean; fi
sync
! command -v fstrim > /dev/null || fstrim / || true
"""


@dataclass(frozen=True)
class Step:
    """One thing that is done in a guest."""

    title: str
    inputs: object
    """All that decides what it does, as JSON."""
    command: str = ""
    files: tuple[tuple[Path, str], ...] = ()


def install(packages: list[str]) -> Step:
    """Install packages with whatever installs them there."""
    names = shlex.join(packages)
    script = f"""
if command -v apt-get; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update && apt-get install -y --no-install-recommends {names} &&
        rm -rf /var/lib/apt/lists/*
elif command -v apk; then
    apk add --no-cache {names}
elif command -v dnf; then
    dnf install -y --setopt=install_weak_deps=False {names}
else
    echo "there is no package manager here that is known: apt-get, apk, dnf" >&2
    exit 1
fi
"""
    return Step(f"installing {names}", ["packages", script], command=script)


def provision(
    parent: tuple[Path, Path],
    step: Step,
    name: str,
    target: Path,
    log: Path,
    say: Progress,
    on_output: Callable[[bytes], object],
    *,
    keep_failed: bool,
) -> None:
    """Do ``step`` in a guest of the image ``parent``; make ``target`` the image that results.

    What is printed goes to the file ``log`` and to ``on_output``. A step that fails is an
    ``ImageError`` that shows the last of it; with ``keep_failed`` its VM is kept then.
    """
    say(step.title)
    config = VMConfig(
        kernel_path=parent[0],
        rootfs_path=parent[1],
        boot_args=SSH_BOOT_ARGS,
        mem_size_mib=_MEM_SIZE_MIB,
        network="nat" if step.command else "isolated",
        backend="qemu",  # whose disks are layers
    )
    with log.open("ab") as record, SmolVM(config, restore=False) as vm:

        def take(data: bytes) -> None:
            record.write(data)
            record.flush()
            on_output(data)

        take(f"== {step.title}\n".encode())
        try:
            _do(vm, step, take)
            vm.run(_TIDY, 300, shell="raw").check()
            vm.stop()
        except SmolVMError as error:
            raise _explained(error, name, step, vm, log, keep_failed) from error
        _take_layer(parent, vm.directory / "disk.qcow2", target)
    (target / LOG).write_bytes(log.read_bytes())


def _do(vm: SmolVM, step: Step, take: Callable[[bytes], object]) -> None:
    for source, there in step.files:
        vm.put(source, there)
    if step.command:
        env = {key: os.environ[key] for key in _PROXIES if key in os.environ}
        vm.run(step.command, STEP_TIMEOUT_S, env=env, on_output=take).check()


def _explained(
    error: SmolVMError, name: str, step: Step, vm: SmolVM, log: Path, keep_failed: bool
) -> ImageError:
    console = harmless(vm.console[-_SHOWN_CHARS:]).strip()
    hint = "to look into the VM, build with pytest-smolvm image build --keep-failed"
    if keep_failed:
        vm.retain(f"building the image {name} failed: {step.title}")
        hint = f"the half-built VM was kept: pytest-smolvm ssh {vm.vm_id}"
    return ImageError(
        f"building the image {name!r} failed at: {step.title}\n{error.message}\n"
        f"--- console ---\n{console}\nAll that was printed: {log}; {hint}",
        {"name": name, "step": step.title, "log": str(log), "vm_id": vm.vm_id},
    )


def _take_layer(parent: tuple[Path, Path], disk: Path, target: Path) -> None:
    """Make ``target`` an image whose disk lies over the parent's; what stays the same is linked."""
    kernel, rootfs = parent
    link_layer(kernel, target)
    link_layer(kernel.with_name(f"{kernel.name}.initrd"), target)
    images = chain_of(rootfs)
    # Counted from the bottom: each layer keeps its name in all that are made over it.
    below = [
        image.path.name if image.format == "raw" else f"layer-{len(images) - number}.qcow2"
        for number, image in enumerate(images)
    ]
    for image, link in zip(images, below, strict=True):
        link_layer(image.path, target, link)
    made = link_layer(disk, target, LAYERED_ROOTFS)
    write_list_of_layers(made, below)
    known = noted_digests(rootfs.parent)
    # The parent's own layer goes by another name here.
    known |= {
        link: known[image.path.name]
        for image, link in zip(images, below, strict=True)
        if image.path.name in known
    }
    note_digests(target, [*below, kernel.name, f"{kernel.name}.initrd"], known)
    manifest = read_manifest(rootfs)
    assert manifest is not None  # noqa: S101 - a guest of it was logged into
    write_manifest(made, manifest)
