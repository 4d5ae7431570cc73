"""What a run needs of this host, tried: what is wrong, what it costs, what mends it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pytest_smolvm.backends.accelerators import (
    AcceleratorReport,
    kvm_access_problem,
    try_accelerator,
)
from pytest_smolvm.backends.qemu import QemuBackend
from pytest_smolvm.backends.qemu_args import ARCHITECTURES, Architecture
from pytest_smolvm.errors import SmolVMError
from pytest_smolvm.hostmemory import available_mib
from pytest_smolvm.limits import DEFAULT_MEM_SIZE_MIB, host_architecture
from pytest_smolvm.process import ToolError, find_tool, run_tool
from pytest_smolvm.records import read_record
from pytest_smolvm.store import Store

Grade = Literal["ok", "note", "problem"]
"""As it should be; something cannot be done, or not as well; no VM can run."""

_QEMU_SEEN = (7, 2)  # the oldest release that this was run on
_DISK_WANTED_MIB = 2048
_FILES_WANTED = 1024
_FILES_PER_VM = 12
_DATA_WANTED_BYTES = 4 << 30
_TRY_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    grade: Grade
    text: str
    """What was found."""
    cost: str = ""
    """What cannot be done that way; empty: nothing."""
    remedy: str = ""
    """One line for a shell, or for a person, that mends it; empty: there is nothing to mend."""


def examine() -> Iterator[Finding]:
    """Look at everything, one thing after the other. Nothing is left but a state directory."""
    for look in (_packages, _qemu, _accelerators, _state_directory, _memory, _limits, _tools):
        yield from look()


def _packages() -> Iterator[Finding]:
    names = {
        "pytest": "pytest",
        "pydantic": "pydantic",
        "paramiko": "paramiko",
        "filelock": "filelock",
        "pytest-xdist": "xdist",
        "qemu.qmp": "qemu.qmp",
    }
    for distribution, module in names.items():
        try:
            importlib.import_module(module)
            version = importlib.metadata.version(distribution)
        except (ImportError, importlib.metadata.PackageNotFoundError) as error:
            yield Finding(
                "packages",
                "problem",
                f"the Python package {distribution} cannot be used: {error}",
                "no VM can run",
                f"{sys.executable} -m pip install {distribution}",
            )
        else:
            yield Finding("packages", "ok", f"{distribution} {version}")


def _qemu() -> Iterator[Finding]:
    for name, architecture in ARCHITECTURES.items():
        is_native = name == host_architecture()
        try:
            binary = find_tool(architecture.binary, architecture.package)
        except ToolError:
            yield Finding(
                "qemu",
                "problem" if is_native else "note",
                f"{architecture.binary} is not installed, or not on PATH",
                "no VM can run" if is_native else f"guests of {name} cannot run",
                f"apt-get install {architecture.package}",
            )
            continue
        version = QemuBackend(binary, architecture, "tcg").version()
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if numbers < _QEMU_SEEN:
            yield Finding(
                "qemu",
                "note",
                f"{binary} is of version {version or 'unknown'}",
                f"nobody has tried it: {'.'.join(map(str, _QEMU_SEEN))} is the oldest that was",
                f"apt-get install {architecture.package}",
            )
        else:
            yield Finding("qemu", "ok", f"{binary}, version {version}")


def _accelerators() -> Iterator[Finding]:
    architecture = ARCHITECTURES.get(host_architecture())
    binary = shutil.which(architecture.binary) if architecture else None
    if architecture is None or binary is None:
        return  # told of above
    native = "hvf" if sys.platform == "darwin" else "kvm"
    found = _native_accelerator(native, binary, architecture)
    yield found
    yield from _firecracker(found)
    emulated = try_accelerator("tcg", binary, architecture, timeout_s=_TRY_TIMEOUT_S)
    if emulated.usable:
        yield Finding("accelerators", "ok", "tcg (emulation) runs a guest")
    else:
        yield Finding(
            "accelerators",
            "problem",
            f"QEMU cannot even emulate a guest: {emulated.reason}",
            "no VM can run without another accelerator",
            f"apt-get install --reinstall {architecture.package}",
        )


def _firecracker(native: Finding) -> Iterator[Finding]:
    """Nobody needs it: it is told of where it is there."""
    binary = shutil.which("firecracker")
    if binary is None:
        return
    # Here, since its HTTP client takes long to load.
    from pytest_smolvm.backends.firecracker import FirecrackerBackend
    from pytest_smolvm.backends.firecracker_api import check_release

    version = FirecrackerBackend(binary, host_architecture()).version()
    try:
        check_release(version)
    except SmolVMError as error:
        yield Finding(
            "firecracker",
            "note",
            f"{binary} is of no use: {error.message}",
            "VMs are on QEMU",
            "install a release of Firecracker that it names, or take it off PATH",
        )
        return
    if native.grade == "ok":
        yield Finding("firecracker", "ok", f"{binary}, version {version}")
    else:
        yield Finding(
            "firecracker",
            "note",
            f"{binary} cannot run: it needs KVM, which cannot be used",
            "VMs are on QEMU",
            "what mends KVM, above",
        )


def _native_accelerator(name: str, binary: str, architecture: Architecture) -> Finding:
    reason = kvm_access_problem(architecture) if name == "kvm" else ""
    report = AcceleratorReport(name, usable=False, reason=reason)
    if not reason:
        report = try_accelerator(name, binary, architecture)
    if report.usable:
        return Finding("accelerators", "ok", f"{name} runs a guest")
    is_closed = Path("/dev/kvm").exists() and not os.access("/dev/kvm", os.R_OK | os.W_OK)
    return Finding(
        "accelerators",
        "note",
        f"{name} cannot be used: {report.reason}",
        "guests are emulated: they boot in seconds, and compute many times slower",
        "sudo adduser $USER kvm  (then log in again)"
        if is_closed
        else "a host, or a kind of virtual host, that offers hardware virtualization",
    )


def _state_directory() -> Iterator[Finding]:
    try:
        store = Store()
    except SmolVMError as error:
        yield Finding(
            "state",
            "problem",
            error.message.partition(";")[0],
            "no VM can run",
            "export SMOLVM_STATE_DIR=DIRECTORY",
        )
        return
    yield Finding("state", "ok", f"{store.root} is ours, can be written to, and has locks")
    free_mib = shutil.disk_usage(store.root).free >> 20
    if free_mib < _DISK_WANTED_MIB:
        yield Finding(
            "disk",
            "note",
            f"{free_mib} MiB are free with {store.root}",
            "builds of images may fail, and guests that write much stand still",
            "pytest-smolvm gc --kept; pytest-smolvm image prune --keep-days 1",
        )
    else:
        yield Finding("disk", "ok", f"{free_mib} MiB are free with {store.root}")
    left = [path.name for path in store.vms.iterdir() if _was_left(store, path)]
    if left:
        yield Finding(
            "leftovers",
            "note",
            f"owners that died left {', '.join(sorted(left))}",
            "the room that they take of the disk, until the next run",
            "pytest-smolvm gc",
        )


def _was_left(store: Store, path: Path) -> bool:
    record = read_record(path)
    return not (record and record.is_kept) and not store.is_owned(path.name)


def _memory() -> Iterator[Finding]:
    available = available_mib()
    if available is None:
        yield Finding("memory", "note", "there is no way to tell how much is free", "", "")
        return
    # What emulation takes on top of the guest's own: docs/performance.md.
    fit = available // (DEFAULT_MEM_SIZE_MIB + 100)
    text = f"{available} MiB can be had: {fit} VMs of {DEFAULT_MEM_SIZE_MIB} MiB at a time"
    if fit < 1:
        yield Finding(
            "memory",
            "problem",
            text,
            "VMs of the default size wait for memory, and then fail",
            "pytest --smolvm-mem-mib=128",
        )
    else:
        yield Finding("memory", "ok", text)


def _limits() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _FILES_WANTED:
        yield Finding(
            "limits",
            "note",
            f"a process may have {files} open files",
            f"each VM takes {_FILES_PER_VM} of its owner's: {files // _FILES_PER_VM} fit at most",
            f"ulimit -n {_FILES_WANTED}",
        )
    for name, kind, letter in (
        ("memory", resource.RLIMIT_DATA, "d"),
        ("addresses", resource.RLIMIT_AS, "v"),
        ("file size", resource.RLIMIT_FSIZE, "f"),
    ):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY and limit < _DATA_WANTED_BYTES:
            yield Finding(
                "limits",
                "problem",
                f"processes are limited to {limit >> 20} MiB of {name}",
                "QEMU may not get what it takes, and end",
                f"ulimit -{letter} unlimited",
            )


_OPTIONAL = (
    ("setpriv", "util-linux", "a QEMU may outlive an owner that is killed, until the next run"),
    ("ssh", "openssh-client", "`pytest-smolvm ssh` cannot be used"),
    ("qemu-img", "qemu-utils", "recipes, and disks with partitions, cannot be made images"),
    ("mkfs.ext4", "e2fsprogs", "no image can be built"),
    ("debugfs", "e2fsprogs", "no image can be built"),
    ("mmdebstrap", "mmdebstrap", "the images 'debian' cannot be built"),
    ("newuidmap", "uidmap", "ordinary users cannot build the images 'debian'"),
    ("sfdisk", "fdisk", "disks with partitions cannot be imported"),
    ("depmod", "kmod", "root file systems cannot be imported with kernels of their own"),
    ("slirp4netns", "slirp4netns", "network='nat' cannot be had"),
    ("ip", "iproute2", "network='nat' cannot be had"),
)


def _tools() -> Iterator[Finding]:
    for name, package, cost in _OPTIONAL:
        with contextlib.suppress(ToolError):
            find_tool(name, package)
            continue
        yield Finding(
            "tools", "note", f"{name} is not installed", cost, f"apt-get install {package}"
        )
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        yield Finding(
            "tools",
            "note",
            "this host has no apt",
            "images are built of Alpine's packages, and their guests boot each time",
            "export SMOLVM_ALPINE_MIRROR=URL  (if the usual one cannot be reached)",
        )
    unshare = shutil.which("unshare")
    if unshare is not None and os.geteuid() != 0:
        try:
            run_tool([unshare, "--user", "--map-root-user", "true"], timeout_s=_TRY_TIMEOUT_S)
        except ToolError:
            yield Finding(
                "tools",
                "note",
                "ordinary users get no user namespaces here",
                "network='nat' and the images 'debian' and 'alpine' take root",
                "sudo sysctl -w kernel.unprivileged_userns_clone=1 "
                "kernel.apparmor_restrict_unprivileged_userns=0",
            )
