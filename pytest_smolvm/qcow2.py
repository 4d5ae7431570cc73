"""qcow2 files: what a header says, and new overlays, without the cost of a process for each.

The format: docs/interop/qcow2.txt in QEMU's sources.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"QFI\xfb"
_VERSION = 3
_CLUSTER_BITS = 16
_CLUSTER_BYTES = 1 << _CLUSTER_BITS
_HEADER_BYTES = 112
_REFCOUNT_ORDER = 4  # refcounts of 16 bits
_BYTES_PER_L1_ENTRY = _CLUSTER_BYTES * (_CLUSTER_BYTES // 8)
_BACKING_FORMAT = 0xE2792ACA
_EXTERNAL_DATA_FILE = 4
_SECTOR_BYTES = 512


@dataclass(frozen=True)
class Header:
    """What matters here of a qcow2 file's first bytes."""

    refers_to_others: bool
    """Whether it names a backing file, or keeps its data in another file."""
    virtual_size: int
    """Bytes that the guest sees."""
    has_data_file: bool = False
    """Whether it keeps its data in another file."""


def read_header(data: bytes) -> Header | None:
    """The header that a file begins with; None if it ends within it."""
    if len(data) < 72:
        return None
    version, backing_offset = struct.unpack_from(">IQ", data, 4)
    (virtual_size,) = struct.unpack_from(">Q", data, 24)
    features = struct.unpack_from(">Q", data, 72)[0] if version >= 3 and len(data) >= 80 else 0
    has_data_file = bool(features & _EXTERNAL_DATA_FILE)
    return Header(bool(backing_offset) or has_data_file, virtual_size, has_data_file)


def write_overlay(overlay: Path, backing: str, backing_format: str, virtual_size: int) -> None:
    """Write an empty overlay of ``virtual_size`` bytes, which must not exist yet.

    ``backing`` is what its header names: an absolute path, or one that is relative to the
    overlay. Only what is not zero is written: some hundred bytes. Raises ``OSError``.
    """
    size = -(-virtual_size // _SECTOR_BYTES) * _SECTOR_BYTES
    l1_entries = max(1, -(-size // _BYTES_PER_L1_ENTRY))
    l1_clusters = -(-l1_entries * 8 // _CLUSTER_BYTES)
    # Clusters: header, refcount table, refcount block, then the L1 table.
    clusters = 3 + l1_clusters
    name = os.fsencode(backing)
    extension = struct.pack(">II", _BACKING_FORMAT, len(backing_format)) + (
        backing_format.encode().ljust(8, b"\0")
    )
    name_at = _HEADER_BYTES + len(extension) + 8
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII8x",
        *(MAGIC, _VERSION, name_at, len(name), _CLUSTER_BITS, size),
        *(0, l1_entries, 3 * _CLUSTER_BYTES),  # no encryption; the L1 table
        *(_CLUSTER_BYTES, 1, 0, 0),  # the refcount table, of one cluster; no snapshots
        *(0, 0, 0, _REFCOUNT_ORDER, _HEADER_BYTES),  # no features
    )
    descriptor = os.open(overlay, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.truncate(descriptor, clusters * _CLUSTER_BYTES)
        os.pwrite(descriptor, header + extension + bytes(8) + name, 0)
        os.pwrite(descriptor, struct.pack(">Q", 2 * _CLUSTER_BYTES), _CLUSTER_BYTES)
        os.pwrite(descriptor, struct.pack(">H", 1) * clusters, 2 * _CLUSTER_BYTES)
    finally:
        os.close(descriptor)
