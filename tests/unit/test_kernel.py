"""Kernels out of distribution packages, and what is done with their modules."""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import lz4.block
import pytest
import zstandard

from pytest_smolvm import ImageError
from pytest_smolvm.images import cpio
from pytest_smolvm.images.debian import Package, _parse_uris
from pytest_smolvm.images.kernel import ModuleTree, extract_vmlinux, kernel_file

KERNEL = b"\x7fELF" + bytes(range(256)) * 4096


def lz4_legacy(data: bytes) -> bytes:
    out = b"\x02\x21\x4c\x18"
    for start in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[start : start + (8 << 20)], store_size=False)
        out += struct.pack("<I", len(block)) + block
    return out + struct.pack("<I", len(data))


def bzimage(payload: bytes) -> bytes:
    setup_sectors = 2
    header = bytearray((setup_sectors + 1) * 512)
    header[0x1F1] = setup_sectors
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", header, 0x248, 64, len(payload))
    return bytes(header) + b"\0" * 64 + payload + b"the rest"


@pytest.mark.parametrize(
    "compress",
    [
        lambda data: lzma.compress(data) + b"size",
        lambda data: zstandard.compress(data) + b"size",
        lambda data: gzip.compress(data) + b"size",
        lz4_legacy,
    ],
    ids=["xz", "zstd", "gzip", "lz4"],
)
def test_a_kernel_comes_out_of_a_bzimage_however_it_is_compressed(compress: object) -> None:
    assert extract_vmlinux(bzimage(compress(KERNEL)), "vmlinuz") == KERNEL  # type: ignore[operator]


def test_an_uncompressed_kernel_is_taken_as_it_is() -> None:
    assert extract_vmlinux(KERNEL, "vmlinux") == KERNEL


def test_what_is_no_kernel_is_an_error_that_names_the_file() -> None:
    with pytest.raises(ImageError, match=r"vmlinuz-6 is neither"):
        extract_vmlinux(b"MZ" + b"\0" * 4096, "vmlinuz-6")
    with pytest.raises(ImageError, match=r"vmlinuz-6 is compressed in a way"):
        extract_vmlinux(bzimage(b"unknown" * 100), "vmlinuz-6")
    with pytest.raises(ImageError, match="not an ELF kernel"):
        extract_vmlinux(bzimage(gzip.compress(b"text")), "vmlinuz-6")


def module(depends: str) -> bytes:
    return b"\x7fELF...\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


def test_modules_are_loaded_after_those_they_depend_on(tmp_path: Path) -> None:
    (tmp_path / "a.ko").write_bytes(module("c-c,b"))
    (tmp_path / "b.ko.xz").write_bytes(lzma.compress(module("c_c")))
    (tmp_path / "c-c.ko").write_bytes(module(""))
    order = ModuleTree(tmp_path).load_order(["a", "built_in"])
    assert [name for name, _ in order] == ["c_c", "b", "a"]
    assert dict(order)["b"] == module("c_c")


def test_an_archive_is_made_of_aligned_records() -> None:
    data = cpio.archive(
        [
            cpio.directory("dev"),
            cpio.character_device("dev/console", 5, 1),
            cpio.file("init", b"#!/bin/sh\n", 0o755),
        ]
    )
    assert len(data) % 4 == 0
    found, position = {}, 0
    while True:
        assert data[position : position + 6] == b"070701"
        field = [int(data[position + 6 + 8 * n : position + 14 + 8 * n], 16) for n in range(13)]
        mode, size, major, minor, length = field[1], field[6], field[9], field[10], field[11]
        name = data[position + 110 : position + 110 + length - 1].decode()
        if name == "TRAILER!!!":
            break
        start = position + 110 + length + (-(110 + length) % 4)
        found[name] = (mode, (major, minor), data[start : start + size])
        position = start + size + (-size % 4)
    assert found == {
        "dev": (0o40755, (0, 0), b""),
        "dev/console": (0o20600, (5, 1), b""),
        "init": (0o100755, (0, 0), b"#!/bin/sh\n"),
    }


def test_package_lists_are_read_as_apt_prints_them() -> None:
    text = (
        "'http://host/pool/b/busybox-static_1.35.0-4%2bb1_amd64.deb' "
        "busybox-static_1%3a1.35.0-4+b1_amd64.deb 928188 MD5Sum:f6f1\n"
        "Reading package lists...\n"
    )
    assert _parse_uris(text) == [
        Package(
            "busybox-static", "1:1.35.0-4+b1", "busybox-static_1%3a1.35.0-4+b1_amd64.deb", 928188
        )
    ]


@pytest.mark.parametrize("compress", [gzip.compress, lambda data: zstandard.compress(data)])
def test_an_arm64_kernel_comes_out_of_whatever_holds_it(
    tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    image = bytearray(b"\0" * 4096)
    image[0x38:0x3C] = b"ARM\x64"
    payload = compress(bytes(image))
    zboot = bytearray(512)
    zboot[:8] = b"MZ\0\0zimg"
    struct.pack_into("<II", zboot, 8, len(zboot), len(payload))
    path = tmp_path / "vmlinuz-virt"
    for content in (image, zboot + payload + struct.pack("<I", len(image))):
        path.write_bytes(content)
        assert kernel_file(path, "aarch64") == image
    path.write_bytes(gzip.compress(bytes(image)))
    assert kernel_file(path, "aarch64") == image
    path.write_bytes(b"MZ" + bytes(600))
    with pytest.raises(ImageError, match="vmlinuz-virt is not an arm64 Image"):
        kernel_file(path, "aarch64")
