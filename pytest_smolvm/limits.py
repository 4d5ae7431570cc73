"""What values settings may have: kept apart, so that options are checked without pydantic."""

from __future__ import annotations

BACKENDS = ("auto", "qemu", "firecracker")
ACCELERATORS = ("auto", "kvm", "hvf", "tcg")
NETWORKS = ("isolated", "nat")
DISK_MODES = ("isolated", "shared")
IMAGES = ("micro",)
DEFAULT_IMAGE = IMAGES[0]

VCPU_COUNT = (1, 32)
MEM_SIZE_MIB = (128, 16384)
DEFAULT_VCPU_COUNT = 2
DEFAULT_MEM_SIZE_MIB = 512
