"""Which disk a VM starts from: a new one, its own from before, or the shared image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pytest_smolvm.config import VMConfig
from pytest_smolvm.disks import (
    Disk,
    Image,
    ImageFormat,
    create_overlay,
    fingerprint_of_image,
    link_layer,
    reopen_overlay,
    shared_disk,
)
from pytest_smolvm.errors import ImageError, SmolVMError
from pytest_smolvm.rawdisks import copy_disk, create_copy, raw_image
from pytest_smolvm.store import Store, VMDirectory


def prepare_disk(
    config: VMConfig,
    directory: VMDirectory,
    layers: Sequence[Path],
    store: Store,
    disk_format: ImageFormat,
) -> Disk:
    """The disk to boot from, made if need be; ``layers`` lie under one that was there before.

    ``disk_format``: what the backend takes; one that takes qcow2 takes all.

    A kept disk over an image that has changed since is an ``ImageError``; one
    that a shared VM would pass over is an error too, since its ``delete()``
    would otherwise remove it.
    """
    kept = directory.disk.exists()
    if config.disk_mode == "shared":
        if kept:
            raise SmolVMError(
                f"the VM {config.vm_id!r} has a kept disk of its own, which disk_mode='shared' "
                f"would not use: choose another vm_id, or remove it: rm -r {directory.path}",
                {"vm_id": config.vm_id},
            )
        if disk_format == "raw":
            return Disk(Image(raw_image(config.rootfs_path, store), "raw"), read_only=True)
        return shared_disk(config.rootfs_path)
    if kept:
        _check_base(config, directory, store)
        if directory.disk.suffix == ".raw":
            return Disk(Image(directory.disk, "raw"))
        if disk_format == "raw":
            raise SmolVMError(
                f"the disk kept of the VM {config.vm_id!r} is qcow2, which this backend does not "
                "take: open it with backend='qemu'",
                {"vm_id": config.vm_id},
            )
        return reopen_overlay(config.rootfs_path, directory.disk, layers)
    if disk_format == "raw":
        return create_copy(config.rootfs_path, directory.disk_of("raw"), store)
    return create_overlay(config.rootfs_path, directory.disk_of("qcow2"))


def disk_from_template(
    config: VMConfig, directory: VMDirectory, layers: Sequence[Path], disk_format: ImageFormat
) -> tuple[Disk, list[Path]]:
    """A new disk that begins as a template's, and the layers that it lies over.

    ``layers``: the template's, the nearest first.
    """
    if disk_format == "raw":
        target = directory.disk_of("raw")
        copy_disk(layers[0], target)
        return Disk(Image(target, "raw")), []
    linked = [link_layer(layer, directory.path) for layer in layers]
    return create_overlay(config.rootfs_path, directory.disk_of("qcow2"), linked), linked


def stat_image(path: Path) -> list[int]:
    """Size and time of the last change (ns): quick to compare, where a hash would take long."""
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]


def keeps_its_disk(config: VMConfig) -> bool:
    """Whether the configuration asks for the disk to be kept after ``delete()``."""
    return config.retain_disk_on_delete and config.disk_mode == "isolated"


def _check_base(config: VMConfig, directory: VMDirectory, store: Store) -> None:
    record = directory.read_record()
    if record and record.base_stat and record.base_stat != stat_image(config.rootfs_path):
        raise ImageError(
            f"the disk kept of the VM {config.vm_id!r} was made over {config.rootfs_path} as it "
            f"was then; that file has changed since, so the disk cannot be used. Put the image "
            f"back, or remove what was kept: rm -r {directory.path}",
            {"vm_id": config.vm_id},
        )
    known = record.base_fingerprint if record else None
    if known is None:
        return  # stopped and started again by one and the same owner
    found = fingerprint_of_image(config.rootfs_path, store.cache)
    if found != known:
        raise ImageError(
            f"the disk kept for the VM {config.vm_id!r} was made over another version of "
            f"{config.rootfs_path}: it cannot be used over this one. Put the image back (SHA-256 "
            f"{known}), or start afresh without that disk: rm -r {directory.path}",
            {"vm_id": config.vm_id, "expected_sha256": known, "found_sha256": found},
        )
