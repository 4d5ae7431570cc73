"""Out of a distribution's kernel package: an uncompressed kernel, and its modules."""

from __future__ import annotations

import lzma
import re
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import lz4.block
import zstandard

from pytest_smolvm.errors import ImageError

ELF_MAGIC = b"\x7fELF"
_LZ4_LEGACY_BLOCK = 8 << 20


def extract_vmlinux(bzimage: bytes, origin: str) -> bytes:
    """The ELF kernel inside an x86 bzImage.

    Offsets are those of the boot protocol's header (Documentation/arch/x86/
    boot.rst): setup_sects at 0x1f1, "HdrS" at 0x202, payload_offset at 0x248,
    payload_length at 0x24c. ``origin`` names the file in errors.
    """
    if bzimage[:4] == ELF_MAGIC:
        return bzimage
    if len(bzimage) < 0x250 or bzimage[0x202:0x206] != b"HdrS":
        raise ImageError(f"{origin} is neither an ELF kernel nor an x86 bzImage")
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = bzimage[start : start + length]
    kernel = _decompress(payload, origin)
    if kernel[:4] != ELF_MAGIC:
        raise ImageError(f"{origin} unpacks to something that is not an ELF kernel")
    return kernel


def _decompress(payload: bytes, origin: str) -> bytes:
    # The kernel's build appends the unpacked size to some of these streams;
    # each branch stops at the end of the stream proper.
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        return zstandard.ZstdDecompressor().decompressobj().decompress(payload)
    if payload.startswith(b"\x02\x21\x4c\x18"):
        return _decompress_lz4_legacy(payload)
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(payload)
    raise ImageError(
        f"{origin} is compressed in a way this library does not read (it starts with "
        f"{payload[:6].hex()}): use a kernel compressed with xz, zstd, lz4 or gzip"
    )


def _decompress_lz4_legacy(payload: bytes) -> bytes:
    out, position = [], 4
    while position + 4 <= len(payload):
        (size,) = struct.unpack_from("<I", payload, position)
        position += 4
        if size == 0 or position + size > len(payload):
            break  # the appended unpacked size, not a block
        block = payload[position : position + size]
        out.append(lz4.block.decompress(block, uncompressed_size=_LZ4_LEGACY_BLOCK))
        position += size
    return b"".join(out)


def kernel_file(path: Path, architecture: str) -> bytes:
    """A distribution's kernel as it is booted: an ELF file on x86, an Image on arm64."""
    data = path.read_bytes()
    if architecture == "x86_64":
        return extract_vmlinux(data, path.name)
    if data[4:8] == b"zimg":
        data = _out_of_zboot(data, path.name)
    # The kernel's documentation, arch/arm64/booting: the magic number of an Image.
    if data[:2] == b"\x1f\x8b":
        data = zlib.decompress(data, wbits=31)
    if data[0x38:0x3C] != b"ARM\x64":
        raise ImageError(f"{path.name} is not an arm64 Image")
    return data


def _out_of_zboot(data: bytes, origin: str) -> bytes:
    """The kernel in an EFI program that unpacks it, as Alpine has for arm64.

    Offsets are those of drivers/firmware/efi/libstub/zboot-header.S in the kernel's source.
    """
    start, length = struct.unpack_from("<II", data, 8)
    return _decompress(data[start : start + length], origin)


def kernel_architecture(kernel: Path) -> str | None:
    """Which guests a kernel is for, by its first bytes; None: it does not say."""
    try:
        with kernel.open("rb") as file:
            head = file.read(0x210)
    except OSError:
        return None  # whoever boots it says what is wrong
    if head[:4] == ELF_MAGIC:
        return {62: "x86_64", 183: "aarch64"}.get(int.from_bytes(head[18:20], "little"))
    if head[0x202:0x206] == b"HdrS":
        return "x86_64"
    return "aarch64" if head[0x38:0x3C] == b"ARM\x64" or head[:2] == b"\x1f\x8b" else None


class ModuleTree:
    """The modules of one kernel, by name, with what each depends on."""

    def __init__(self, root: Path) -> None:
        self._paths = {
            path.name.split(".ko")[0].replace("-", "_"): path for path in root.rglob("*.ko*")
        }

    def has(self, names: Iterable[str]) -> bool:
        """Whether all of these are there. What is built into the kernel is not."""
        return all(name in self._paths for name in names)

    def load_order(self, wanted: Iterable[str]) -> list[tuple[str, bytes]]:
        """Names and uncompressed contents, dependencies first.

        A wanted module that the package does not have is built into the kernel.
        """
        order: dict[str, bytes] = {}

        def add(name: str) -> None:
            if name in order or name not in self._paths:
                return
            data = _read_module(self._paths[name])
            for dependency in _dependencies(data):
                add(dependency)
            order[name] = data

        for name in wanted:
            add(name)
        return list(order.items())


def _read_module(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    if path.suffix == ".gz":
        return zlib.decompress(data, wbits=31)
    return data


def _dependencies(module: bytes) -> list[str]:
    # The .modinfo section is a run of NUL-terminated "key=value" strings.
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    names = found.group(1).decode().split(",") if found else []
    return [name.replace("-", "_") for name in names if name]
