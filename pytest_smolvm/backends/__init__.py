"""choose(): which backend and accelerator really work on this host."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence

from pytest_smolvm.backends.accelerators import AcceleratorReport, report_accelerator
from pytest_smolvm.backends.base import Backend
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
    not_on_firecracker: Sequence[str] = (),
) -> Backend:
    """The backend to use; ``backend`` and ``accelerator`` narrow the choice.

    ``guest``: the architecture of the guest; None: this host's. ``not_on_firecracker``: what is
    asked for that Firecracker does not do, in words. Where nobody says which, that one is taken if
    it is there and can do it all, on KVM that was seen to run a guest; else QEMU. Raises
    ``BackendError`` that says what is missing where nothing fits.
    """
    if accelerator not in ACCELERATORS:
        raise BackendError(
            f"there is no accelerator {accelerator!r}: use one of {', '.join(ACCELERATORS)}"
        )
    if backend not in (None, "auto", "qemu", "firecracker"):
        raise BackendError(
            f"there is no backend {backend!r}: use 'qemu', 'firecracker', 'auto' or None"
        )
    architecture = guest_architecture(guest or host_architecture())
    missing: list[str] = []
    if backend != "qemu":
        binary = shutil.which("firecracker")
        if backend == "firecracker" or binary is not None:
            missing = _missing_for_firecracker(
                store, binary, accelerator, architecture, not_on_firecracker
            )
            if binary is not None and not missing:
                # Here, since its HTTP client takes longer to load than all else together.
                from pytest_smolvm.backends.firecracker import FirecrackerBackend

                return FirecrackerBackend(binary, architecture.name)
        if backend == "firecracker":
            raise _no_firecracker(missing)
    return _choose_qemu(store, accelerator, architecture, missing)


def _choose_qemu(
    store: Store, accelerator: str, architecture: Architecture, not_firecracker: Sequence[str]
) -> Backend:
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
            if not_firecracker and name != "tcg":
                # Where it is KVM that is lacking, that is told already.
                reasons.append(f"not firecracker: {'; '.join(not_firecracker)}")
            logger.debug("accelerator %s%s", name, "".join(f"; {reason}" for reason in reasons))
            return QemuBackend(qemu, architecture, name, tuple(reasons))
        reasons.append(f"not {name}: {report.reason}")
    raise BackendError(
        f"the accelerator {accelerator!r} cannot be used here: {'; '.join(reasons)}. "
        "'auto' falls back to emulation.",
        {"accelerator": accelerator, "reasons": reasons},
    )


def _missing_for_firecracker(
    store: Store,
    binary: str | None,
    accelerator: str,
    architecture: Architecture,
    not_on_firecracker: Sequence[str],
) -> list[str]:
    """Every reason why Firecracker cannot run such a guest here, in words."""
    missing = list(not_on_firecracker)
    if binary is None:
        missing.append("no program called 'firecracker' is on PATH")
    if accelerator not in ("auto", "kvm"):
        missing.append(f"it runs on KVM only, and the accelerator asked for is {accelerator!r}")
    kvm = _kvm(store, architecture)
    if not kvm.usable:
        missing.append(f"Firecracker needs KVM, and {kvm.reason}")
    return missing


def _kvm(store: Store, architecture: Architecture) -> AcceleratorReport:
    try:
        qemu = find_tool(architecture.binary, architecture.package)
    except ToolError as error:
        reason = f"it cannot be tried without QEMU: {error.message}"
        return AcceleratorReport("kvm", usable=False, reason=reason)
    return report_accelerator("kvm", store, qemu, architecture)


def _no_firecracker(missing: Sequence[str]) -> BackendError:
    return BackendError(
        "the backend 'firecracker' cannot be used here: "
        + "; ".join(missing)
        + ". Use backend='qemu', or None to let pytest-smolvm choose.",
        {"backend": "firecracker", "missing": list(missing)},
    )
