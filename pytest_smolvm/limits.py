"""What values settings may have: kept apart, so that options are checked without pydantic."""

from __future__ import annotations

import os

BACKENDS = ("auto", "qemu", "firecracker")
ACCELERATORS = ("auto", "kvm", "hvf", "tcg")
NETWORKS = ("isolated", "nat")
DISK_MODES = ("isolated", "shared")
IMAGES = ("micro", "debian", "debian-12", "debian-13", "alpine")
DEFAULT_IMAGE = IMAGES[0]

VCPU_COUNT = (1, 32)
MEM_SIZE_MIB = (128, 16384)
DEFAULT_VCPU_COUNT = 2
DEFAULT_MEM_SIZE_MIB = 512

ARCHITECTURES = ("x86_64", "aarch64")
"""Of guests, as Linux calls them."""


def host_architecture() -> str:
    """What this host's processor is called in ``ARCHITECTURES``, if it is there."""
    machine = os.uname().machine
    return {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)
