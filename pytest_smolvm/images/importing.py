"""A root file system that knows nothing of this project, made an image that boots to SSH.

The file system stays as it is: what the guest lacks (first process, SSH server, host key, agent)
comes in the initial RAM disk, and lives in the guest's /run. The kernel is the distribution's own
where the disk has one with its modules; where it has none, ours is added, with its modules.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pytest_smolvm import keys
from pytest_smolvm.errors import ImageError
from pytest_smolvm.images import agent, ext4, guestfiles
from pytest_smolvm.images.cache import Progress
from pytest_smolvm.images.guestfiles import COMPANION
from pytest_smolvm.images.initrd import can_do_without_pci, make_companion, make_initrd
from pytest_smolvm.images.kernel import kernel_file
from pytest_smolvm.images.manifest import ImageManifest, write_manifest
from pytest_smolvm.images.toolbox import MODULES, MODULES_WITHOUT_PCI, Toolbox, ToolSource
from pytest_smolvm.process import ToolError, find_tool, run_tool

FORMAT = 1
"""Raised whenever the same root file system would make another image."""

MakeRoot = Callable[[Path, Path], None]
"""Writes an ext4 image (first) with a directory to work in (second)."""

_MODULES_ROOM_BYTES = 8 << 20
_KERNEL_NAMES = ("vmlinuz-", "Image-", "vmlinux-")


def recipe(architecture: str) -> dict[str, object]:
    """What decides what is added to a root file system, but for packages and key, as JSON."""
    return {
        "format": FORMAT,
        "architecture": architecture,
        "files": [
            *(guestfiles.initrd_init(MODULES, MODULES_WITHOUT_PCI), guestfiles.COMPANION_INIT),
            *(guestfiles.COMPANION_SSH_ON_PORT, guestfiles.RESOLV_CONF),
            *guestfiles.COMPANION_APPLETS,
            *guestfiles.COMPANION_SCRIPTS.values(),
        ],
        "agent": hashlib.sha256(agent.binary(architecture)).hexdigest(),
    }


def build_image(
    name: str,
    make_root: MakeRoot,
    tools: ToolSource,
    architecture: str,
    public_key: str,
    kernel: Path | None,
    target: Path,
    work: Path,
    say: Progress,
) -> None:
    """Make kernel, initial RAM disk and root disk in ``target``, with the manifest.

    ``kernel``: the one to use; None: the root disk's own, or else ours.
    """
    rootfs = target / "rootfs.ext4"
    folder = work / "root-work"
    folder.mkdir()
    make_root(rootfs, folder)
    _check_root(rootfs, name)
    toolbox = tools.unpack(work)
    kernel_image, modules = _choose_kernel(rootfs, kernel, toolbox, work, say)
    (target / "vmlinux").write_bytes(kernel_file(kernel_image, architecture))
    say("making the initial RAM disk")
    host_key = Ed25519PrivateKey.generate()
    companion = make_companion(toolbox, architecture, host_key, public_key)
    (target / "vmlinux.initrd").write_bytes(make_initrd(toolbox, modules, companion))
    write_manifest(
        rootfs,
        ImageManifest(
            name=name,
            host_key=keys.public_openssh(host_key),
            authorized_keys=[public_key],
            packages=toolbox.versions,
            agent=f"{COMPANION}/agent" if toolbox.can_restore() else "",
            vsock=can_do_without_pci(modules),
        ),
    )


def _check_root(rootfs: Path, name: str) -> None:
    for path, what in (
        ("/bin/sh", "a shell, for commands to be run by"),
        ("/etc/passwd", "a list of users, with root in it"),
    ):
        if not ext4.has_file(rootfs, path):
            raise ImageError(
                f"the root file system of the image {name!r} has no {path}: a guest needs {what}. "
                "Give a whole root file system, not a program's image made from scratch",
                {"missing": path},
            )


def _choose_kernel(
    rootfs: Path, kernel: Path | None, toolbox: Toolbox, work: Path, say: Progress
) -> tuple[Path, Path]:
    """The kernel to boot, and the folder of its modules (empty where there are none)."""
    releases = ext4.names_in(rootfs, ext4.resolve(rootfs, "/lib/modules"))
    if kernel is not None:
        return kernel, _own_modules(rootfs, _release_of(kernel, releases), work)
    own = _own_kernel(rootfs, releases, work)
    if own is not None:
        image, release = own
        say(f"using the root disk's own kernel, {release}")
        return image, _own_modules(rootfs, release, work)
    _add_modules(rootfs, toolbox, say)
    return toolbox.kernel_image(), toolbox.modules()


def _own_kernel(rootfs: Path, releases: list[str], work: Path) -> tuple[Path, str] | None:
    """The newest kernel in /boot whose modules are there, too."""
    names = ext4.names_in(rootfs, "/boot")
    for release in sorted(releases, key=_version_key, reverse=True):
        for prefix in _KERNEL_NAMES:
            if f"{prefix}{release}" in names:
                path = work / "own-kernel"
                ext4.copy_out(rootfs, f"/boot/{prefix}{release}", path)
                return path, release
        # Alpine's files are called for their kind: vmlinuz-virt, of 6.18.56-0-virt.
        flavour = release.rpartition("-")[2]
        if f"vmlinuz-{flavour}" in names:
            path = work / "own-kernel"
            ext4.copy_out(rootfs, f"/boot/vmlinuz-{flavour}", path)
            return path, release
    return None


def _own_modules(rootfs: Path, release: str, work: Path) -> Path:
    folder = work / "own-modules"
    folder.mkdir()
    if release:
        ext4.copy_tree_out(rootfs, ext4.resolve(rootfs, f"/lib/modules/{release}"), folder)
    return folder


def _release_of(kernel: Path, releases: list[str]) -> str:
    """Which of the root disk's sets of modules are a kernel's own; empty: none is."""
    data = kernel.read_bytes()
    for release in releases:
        # The version is text in a bzImage's header as well as in an ELF kernel.
        if f"{release} (".encode() in data:
            return release
    return ""


def _version_key(release: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"[.-]", release)]


def _add_modules(rootfs: Path, toolbox: Toolbox, say: Progress) -> None:
    """Put our kernel's modules where the guest looks for them, if there is room."""
    modules = toolbox.modules()
    total = sum(path.stat().st_size + 4096 for path in modules.rglob("*") if path.is_file())
    if ext4.free_bytes(rootfs) < total + _MODULES_ROOM_BYTES:
        say("the root disk has no room for the kernel's modules: the guest does without")
        return
    _index(modules, say)
    inside = ext4.resolve(rootfs, "/lib/modules")
    if not ext4.has_file(rootfs, inside):
        ext4.edit(rootfs, [f"mkdir {ext4.quote(inside)}"])
    say("adding the kernel's modules")
    ext4.add_tree(rootfs, modules, f"{inside}/{modules.name}")


def _index(modules: Path, say: Progress) -> None:
    """Write what modprobe reads (modules.dep and others)."""
    if os.path.lexists(modules / "modules.dep"):
        return
    try:
        depmod = find_tool("depmod", "kmod")
    except ToolError as error:
        say(f"modprobe will find no modules in the guest: {error.message}")
        return
    run_tool([depmod, "-b", str(modules.parents[2]), modules.name], timeout_s=120)
