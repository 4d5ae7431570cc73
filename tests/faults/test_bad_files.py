"""Kernels, initial RAM disks and root disks that are none: an error of ours, and nothing left."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from pytest_smolvm import (
    BackendError,
    ImageError,
    OperationTimeoutError,
    SmolVM,
    SmolVMError,
    VMConfig,
)
from pytest_smolvm.images.manifest import manifest_path
from tests.conftest import qemu_pids

NOBODY = 65534
# Far beyond what a boot takes: a test that waited it out would be noticed.
PATIENCE_S = 600.0
Make = Callable[[Path, Path], object]
"""Makes a bad file at the first path; the second is a good one."""


def elf(machine: int) -> bytes:
    """An ELF header (64 bits, little-endian) of a machine's kernel, and nothing behind it."""
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    return head + struct.pack(
        "<HHIQQQIHHHHHH", 2, machine, 1, 1 << 20, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )


def qcow2(path: Path, *options: str) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, "64M"], check=True)


def with_data_file(path: Path) -> None:
    qcow2(path, "-o", f"data_file={path}.raw")


def over_the_hosts_file(path: Path, good: Path) -> None:
    qcow2(path, "-b", str(good), "-F", "raw")


def patched(path: Path, offset: int, data: bytes) -> None:
    qcow2(path)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(4 << 30)


def loop(path: Path) -> None:
    path.symlink_to(path)


def first(part: float) -> Make:
    def write(path: Path, good: Path) -> None:
        data = good.read_bytes()
        path.write_bytes(data[: int(len(data) * part)])

    return write


COMMON: dict[str, Make] = {
    "zero bytes": lambda path, _: path.touch(),
    "random": lambda path, _: path.write_bytes(os.urandom(1 << 20)),
    "text": lambda path, _: path.write_text("no such thing\n" * 1000),
    "a directory": lambda path, _: path.mkdir(),
    "nothing": lambda *_: None,
    "a loop of links": lambda path, _: loop(path),
    "a pipe": lambda path, _: os.mkfifo(path),
    "4 GiB of nothing": lambda path, _: sparse(path),
    "one byte": lambda path, _: path.write_bytes(b"\x7f"),
    "half": first(0.5),
    "a tenth": first(0.1),
}
KERNELS: dict[str, Make] = {
    **COMMON,
    "of RISC-V": lambda path, _: path.write_bytes(elf(243) + bytes(4096)),
    "of i386": lambda path, _: path.write_bytes(elf(3) + bytes(4096)),
    "an ELF header alone": lambda path, _: path.write_bytes(elf(62)),
    "an ELF file that ends in its headers": lambda path, _: path.write_bytes(elf(62)[:40]),
    "a bzImage header alone": lambda path, _: path.write_bytes(bytes(0x202) + b"HdrS" + bytes(99)),
    "an arm64 header alone": lambda path, _: path.write_bytes(bytes(0x38) + b"ARM\x64" + bytes(99)),
}
DISKS: dict[str, Make] = {
    **COMMON,
    "qcow2 over a file of the host": over_the_hosts_file,
    "qcow2 with its data elsewhere": lambda path, _: with_data_file(path),
    "qcow2 cut off in its header": lambda path, _: path.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(30)),
    "qcow2 of a version to come": lambda path, _: patched(path, 4, struct.pack(">I", 9)),
    "qcow2 with clusters of no size": lambda path, _: patched(path, 20, struct.pack(">I", 63)),
    "qcow2 of 2^63 bytes": lambda path, _: patched(path, 24, struct.pack(">Q", 1 << 63)),
    "qcow2 of no bytes": lambda path, _: patched(path, 24, bytes(8)),
    "qcow2 with its table nowhere": lambda path, _: patched(path, 40, struct.pack(">Q", 1 << 60)),
    "qcow2 with features to come": lambda path, _: patched(path, 72, struct.pack(">Q", 1 << 40)),
    "qcow2 with garbage behind": lambda path, _: patched(path, 104, os.urandom(200_000)),
}
CORPUS = [
    *(("kernel_path", name, make) for name, make in KERNELS.items()),
    *(("initrd_path", name, make) for name, make in COMMON.items()),
    *(("rootfs_path", name, make) for name, make in DISKS.items()),
]


@pytest.mark.parametrize(("field", "what", "make"), CORPUS, ids=[f"{f}-{w}" for f, w, _ in CORPUS])
def test_a_bad_file_is_an_error_of_ours_and_leaves_nothing(
    micro_config: VMConfig, no_vms: Path, tmp_path: Path, field: str, what: str, make: Make
) -> None:
    good = getattr(micro_config, field) or micro_config.kernel_path.with_name("vmlinux.initrd")
    bad = tmp_path / "bad"
    make(bad, good)
    fields = {**micro_config.model_dump(), field: bad}
    if field == "rootfs_path":
        # Else nothing but its lack would be found.
        manifest_path(bad).write_bytes(manifest_path(good).read_bytes())
    # That one does nothing for as long as one waits.
    timeout_s = 5 if what == "an arm64 header alone" else PATIENCE_S
    with pytest.raises((SmolVMError, ValidationError)) as caught:
        SmolVM(VMConfig(**fields), restore=False).start(boot_timeout=timeout_s)
    if isinstance(caught.value, OperationTimeoutError):
        assert timeout_s < PATIENCE_S
    said = str(caught.value)
    assert "Traceback" not in said
    assert "panic" in said or str(bad) in said or re.search(r"QEMU said|disk", said), said
    if field == "rootfs_path" and "qcow2" in what and isinstance(caught.value, SmolVMError):
        assert isinstance(caught.value, (ImageError, BackendError))
    assert qemu_pids() == set()
    assert list((no_vms / "vms").glob("*")) == []


@pytest.mark.parametrize("field", ["kernel_path", "initrd_path", "rootfs_path"])
def test_a_file_that_may_not_be_read_is_refused_by_the_configuration(field: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        paths = {key: folder / key for key in ("kernel_path", "initrd_path", "rootfs_path")}
        for path in paths.values():
            path.write_bytes(b"x")
            path.chmod(0o644)
        paths[field].chmod(0)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(NOBODY)  # whom a file's mode keeps out
        try:
            with pytest.raises(ValidationError, match=f"{field}' may not be read by this user"):
                VMConfig(**paths)
        finally:
            if is_root:
                os.seteuid(0)
