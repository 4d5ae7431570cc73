"""choose(): which backend and accelerator really work on this host."""

from __future__ import annotations

import logging
import sys

from pytest_smolvm.backends.accelerators import AcceleratorReport, report_accelerator
from pytest_smolvm.backends.base import Backend
from pytest_smolvm.backends.firecracker import refuse_firecracker
from pytest_smolvm.backends.qemu import QemuBackend
from pytest_smolvm.backends.qemu_args import ARCHITECTURES, Architecture
from pytest_smolvm.errors import BackendError
from pytest_smolvm.limits import ACCELERATORS, host_architecture
from pytest_smolvm.process import ToolError, find_tool
from pytest_smolvm.store import Store

logger = logging.getLogger(__name__)


def guest_architecture(name: str) -> Architecture:
    """What is known of guests of that architecture."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        raise BackendError(
            f"guests of the kind {name!r} are not supported: use one of {', '.join(ARCHITECTURES)}",
            {"machine": name},
        ) from None


def choose(
    store: Store,
    backend: str | None = None,
    accelerator: str = "auto",
    guest: str | None = None,
) -> Backend:
    """The backend to use; ``backend`` and ``accelerator`` narrow the choice.

    ``guest``: the architecture of the guest; None: this host's. Raises ``BackendError`` that
    says what is missing where nothing fits.
    """
    if accelerator not in ACCELERATORS:
        raise BackendError(
            f"there is no accelerator {accelerator!r}: use one of {', '.join(ACCELERATORS)}"
        )
    architecture = guest_architecture(guest or host_architecture())
    if backend == "firecracker":
        try:
            qemu = find_tool(architecture.binary, architecture.package)
        except ToolError as error:
            kvm = AcceleratorReport(
                "kvm", usable=False, reason=f"it cannot be tried without QEMU: {error.message}"
            )
        else:
            kvm = report_accelerator("kvm", store, qemu, architecture)
        raise refuse_firecracker(kvm)
    if backend not in (None, "auto", "qemu"):
        raise BackendError(
            f"there is no backend {backend!r}: use 'qemu', 'firecracker', 'auto' or None"
        )
    try:
        qemu = find_tool(architecture.binary, architecture.package)
    except ToolError as error:
        raise BackendError(f"no VM can run here: {error.message}", {"backend": "qemu"}) from error
    native = "hvf" if sys.platform == "darwin" else "kvm"
    candidates = [native, "tcg"] if accelerator == "auto" else [accelerator]
    reasons: list[str] = []
    for name in candidates:
        report = report_accelerator(name, store, qemu, architecture)
        if report.usable:
            logger.debug("accelerator %s%s", name, "".join(f"; {reason}" for reason in reasons))
            return QemuBackend(qemu, architecture, name, tuple(reasons))
        reasons.append(f"not {name}: {report.reason}")
    raise BackendError(
        f"the accelerator {accelerator!r} cannot be used here: {'; '.join(reasons)}. "
        "'auto' falls back to emulation.",
        {"accelerator": accelerator, "reasons": reasons},
    )
