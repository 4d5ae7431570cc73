"""Which accelerator really runs a guest here: tried, not looked up.

That ``/dev/kvm`` opens, and that QEMU lists kvm, prove nothing: there are
hosts where both hold and no guest ever gets past its first instructions. So
each accelerator has to run a guest of a few instructions, which switches on
paging (and long mode, on x86) and tells QEMU to stop. One that cannot do that
within a second is taken for unusable, and what was found is remembered until
the host boots again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pytest_smolvm.backends.qemu_args import Architecture
from pytest_smolvm.limits import host_architecture
from pytest_smolvm.process import run_to_end
from pytest_smolvm.statedir import make_private_dir, read_json, write_json
from pytest_smolvm.store import Store

PROBE_TIMEOUT_S = 0.8
_KVM = Path("/dev/kvm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class AcceleratorReport:
    """Whether one accelerator ran the probe; ``reason`` says why it did not."""

    name: str
    usable: bool
    reason: str = ""


@dataclass(frozen=True)
class _Probe:
    guest: bytes
    devices: tuple[str, ...]
    exit_status: int
    """QEMU's, once the guest has done its work."""


_PROBES = {
    # A multiboot kernel, loaded at 1 MiB in 32-bit protected mode:
    #   header: magic, flags (addresses given), checksum, the addresses
    #   zero three pages; PML4[0] -> PDPT[0] -> PD[0] = 2 MiB identity page
    #   cr3; cr4.PAE; efer.LME; cr0.PG; lgdt; far jump into 64-bit code
    #   mov dx, 0xf4; mov al, 0x2a; out dx, al; 1: hlt; jmp 1b
    # isa-debug-exit ends QEMU with the status (0x2a << 1) | 1.
    "x86_64": _Probe(
        bytes.fromhex(
            "02b0ad1b00000100fe4f51e40000100000001000000000000000000020001000"
            "fafcbf0000120031c0b9000c0000f3abc7050000120003101200c70500101200"
            "03201200c7050020120083000000b8000012000f22d80f20e083c8200f22e0b9"
            "800000c00f320d000100000f300f20c00d000000800f22c00f0115a0001000ea"
            "86001000080066baf400b02aeef4ebfd000000000000000000000000009a2000"
            "0f0090001000"
        ),
        ("isa-debug-exit,iobase=0xf4,iosize=4",),
        85,
    ),
    # movz w0, #8; movk w0, #0x8400, lsl #16; hvc #0: PSCI SYSTEM_OFF
    # (DEN0022). It runs without paging: the firmware call alone is enough to
    # see that the guest's instructions are executed.
    "aarch64": _Probe(bytes.fromhex("000180520080b072020000d4"), (), 0),
}


def report_accelerator(
    name: str, store: Store, qemu: str, architecture: Architecture
) -> AcceleratorReport:
    """Try the accelerator ``name`` with the emulator ``qemu``, or recall how it went."""
    if name == "tcg":
        return AcceleratorReport("tcg", usable=True)
    if name == "kvm":
        reason = kvm_access_problem(architecture)
        if reason:
            return AcceleratorReport("kvm", usable=False, reason=reason)
    return _remembered(
        store, _circumstances(name, qemu), lambda: try_accelerator(name, qemu, architecture)
    )


def kvm_access_problem(architecture: Architecture) -> str:
    """Why KVM cannot even be tried; empty: it can."""
    if host_architecture() != architecture.name:
        return f"this host does not run {architecture.name} code itself"
    if not _KVM.exists():
        return "there is no /dev/kvm (no hardware virtualization, or it is not exposed here)"
    if not os.access(_KVM, os.R_OK | os.W_OK):
        return (
            "/dev/kvm may not be opened by this user (add yourself to the group that owns it: "
            "sudo adduser $USER kvm, then log in again)"
        )
    return ""


def _remembered(
    store: Store, circumstances: str, probe: Callable[[], AcceleratorReport]
) -> AcceleratorReport:
    memory = make_private_dir(store.cache) / f"accelerator-{circumstances}.json"
    known = read_json(memory)
    with contextlib.suppress(TypeError):
        if known is not None:
            return AcceleratorReport(**known)
    report = probe()
    write_json(memory, asdict(report))
    return report


def _circumstances(name: str, qemu: str) -> str:
    """Changes with the host's boot, the emulator, and the device's owner and mode."""
    facts: list[object] = [name, qemu, os.geteuid(), PROBE_TIMEOUT_S]
    with contextlib.suppress(OSError):
        facts.append(_BOOT_ID.read_text())
    for path in (Path(qemu), _KVM):
        with contextlib.suppress(OSError):
            found = path.stat()
            facts.append((found.st_ino, found.st_mode, found.st_uid, found.st_gid))
            if path != _KVM:
                facts.append((found.st_size, found.st_mtime_ns))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def try_accelerator(
    name: str, qemu: str, architecture: Architecture, timeout_s: float = PROBE_TIMEOUT_S
) -> AcceleratorReport:
    """Try the accelerator ``name`` now, with a guest of a few instructions."""
    probe = _PROBES[architecture.name]
    with tempfile.NamedTemporaryFile(prefix="smolvm-probe-") as kernel:
        kernel.write(probe.guest)
        kernel.flush()
        argv = [
            *(qemu, "-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", architecture.machine, "-accel", name),
            *("-cpu", architecture.cpu_emulated if name == "tcg" else "host"),
            *("-m", "64", "-kernel", kernel.name),
            *(part for device in probe.devices for part in ("-device", device)),
        ]
        try:
            done = run_to_end(argv, timeout_s=timeout_s)
        except subprocess.TimeoutExpired:
            return AcceleratorReport(
                name,
                usable=False,
                reason=f"a guest of a few instructions did not end within {timeout_s:g} s "
                f"under {name}",
            )
    if done.returncode == probe.exit_status:
        return AcceleratorReport(name, usable=True)
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    said = lines[0] if lines else f"exit status {done.returncode}"
    return AcceleratorReport(
        name, usable=False, reason=f"QEMU could not run a guest under {name} ({said})"
    )
