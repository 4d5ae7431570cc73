"""Firecracker: what this host lacks to run it."""

from __future__ import annotations

import shutil

from pytest_smolvm.backends.accelerators import AcceleratorReport
from pytest_smolvm.errors import BackendError


def missing_for_firecracker(kvm: AcceleratorReport) -> list[str]:
    """Every reason why Firecracker cannot run a guest here, in words."""
    missing = []
    if shutil.which("firecracker") is None:
        missing.append("no program called 'firecracker' is on PATH")
    if not kvm.usable:
        missing.append(f"Firecracker needs KVM, and {kvm.reason}")
    missing.append("this release of pytest-smolvm does not drive Firecracker yet")
    return missing


def refuse_firecracker(kvm: AcceleratorReport) -> BackendError:
    """The error for ``backend="firecracker"``."""
    missing = missing_for_firecracker(kvm)
    return BackendError(
        "the backend 'firecracker' cannot be used here: "
        + "; ".join(missing)
        + ". Use backend='qemu', or None to let pytest-smolvm choose.",
        {"backend": "firecracker", "missing": missing},
    )
