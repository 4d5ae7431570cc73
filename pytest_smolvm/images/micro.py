"""The image ``micro``: a Debian kernel, busybox, dropbear, and nothing else.

Made from packages of the host's Debian release by unpacking, without root
rights: no chroot, no loop device, no maintainer scripts.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pytest_smolvm import keys
from pytest_smolvm.errors import ImageError
from pytest_smolvm.images import agent, cpio, ext4, guestfiles
from pytest_smolvm.images.debian import DebianPackages, Progress
from pytest_smolvm.images.kernel import ModuleTree, extract_vmlinux
from pytest_smolvm.images.manifest import HOST_KEY_IN_IMAGE, ImageManifest, write_manifest
from pytest_smolvm.process import run_tool

FORMAT = 2
"""Raised whenever the same packages would make another image."""

PACKAGES = ["busybox-static", "dropbear-bin"]

# In order of preference. The cloud kernels are half the size of the generic
# one and boot as fast; from 6.12 on they have vmgenid built in, which lets a
# guest reseed its random pool by itself when it is restored from a snapshot.
KERNELS = ["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64", "linux-image-amd64"]

MODULES = [
    *("virtio_pci", "virtio_blk", "ext4", "crc32c_generic"),
    *("virtio_net", "virtio_rng", "virtio_console"),
]

_FOLDERS = [
    *("dev", "proc", "sys", "run", "tmp", "root/.ssh", "mnt", "home"),
    *("etc/dropbear", "etc/profile.d", "etc/smolvm", "var/log", "var/tmp"),
    *("usr/bin", "usr/sbin", "usr/lib/smolvm", "usr/lib64", "usr/local/bin", "usr/local/sbin"),
]


class MicroRecipe:
    """How ``micro`` is made, and from what: the two halves of its cache key."""

    def __init__(self, downloads: Path, public_key: str, size_mb: int, progress: Progress):
        if platform.machine() != "x86_64":
            raise ImageError(
                f"the image 'micro' cannot be built on {platform.machine()} yet: give a kernel "
                "and a root disk by path"
            )
        self._progress = progress
        self._public_key = public_key
        self._size_mb = size_mb
        self._debian = DebianPackages(downloads, progress)
        self.packages = self._debian.resolve(PACKAGES, KERNELS)

    def inputs(self) -> dict[str, object]:
        """All that decides what the image will be, as JSON."""
        return {
            "recipe": "micro",
            "format": FORMAT,
            "packages": [[p.name, p.version] for p in self.packages],
            "public_key": self._public_key,
            "size_mb": self._size_mb,
            "files": [
                *(guestfiles.initrd_init(MODULES), guestfiles.MICRO_INIT),
                guestfiles.MICRO_SSH_ON_PORT,
            ],
            "agent": hashlib.sha256(agent.binary()).hexdigest(),
            "more_files": guestfiles.MICRO_FILES,
        }

    def build(self, target: Path, work: Path, name: str) -> None:
        """Make ``vmlinux``, ``vmlinux.initrd``, ``rootfs.ext4`` and its manifest in ``target``."""
        archives = self._debian.download(self.packages)
        self._progress("unpacking the kernel")
        kernel_tree, tree = work / "kernel", work / "packages"
        for package, archive in zip(self.packages, archives, strict=True):
            is_kernel = package.name.startswith("linux-image-")
            self._debian.unpack(archive, kernel_tree if is_kernel else tree)
        busybox = _find(tree, "bin/busybox")
        self._make_kernel(kernel_tree, busybox, target)
        self._progress("making the root disk")
        host_key = Ed25519PrivateKey.generate()
        root = self._make_tree(tree, busybox, host_key, work / "root")
        rootfs = target / "rootfs.ext4"
        ext4.make_ext4(root, rootfs, self._size_mb)
        write_manifest(
            rootfs,
            ImageManifest(
                name=name,
                host_key=keys.public_openssh(host_key),
                authorized_keys=[self._public_key],
                packages={p.name: p.version for p in self.packages},
                agent=f"/{guestfiles.AGENT}",
                reads_boot_id=False,
            ),
        )

    @staticmethod
    def _make_kernel(tree: Path, busybox: Path, target: Path) -> None:
        bzimage = next((tree / "boot").glob("vmlinuz-*"), None)
        if bzimage is None:
            raise ImageError(f"no /boot/vmlinuz-* in the kernel package under {tree}")
        (target / "vmlinux").write_bytes(extract_vmlinux(bzimage.read_bytes(), bzimage.name))
        modules = ModuleTree(tree).load_order(MODULES)
        entries = [cpio.directory(n) for n in ("bin", "dev", "proc", "modules", "root-disk")]
        entries += [
            cpio.character_device("dev/console", 5, 1),
            cpio.file("bin/busybox", busybox.read_bytes(), 0o755),
            cpio.file("init", guestfiles.initrd_init(n for n, _ in modules).encode(), 0o755),
        ]
        entries += [cpio.file(f"modules/{n}.ko", data) for n, data in modules]
        (target / "vmlinux.initrd").write_bytes(cpio.archive(entries))

    def _make_tree(
        self, packages: Path, busybox: Path, host_key: Ed25519PrivateKey, root: Path
    ) -> Path:
        for name in _FOLDERS:
            (root / name).mkdir(parents=True, exist_ok=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (root / name).symlink_to(f"usr/{name}")
        shutil.copy(busybox, root / "usr/bin/busybox")
        shutil.copy(_find(packages, "sbin/dropbear"), root / "usr/sbin/dropbear")
        _copy_libraries(packages, root)
        for applet in run_tool([str(busybox), "--list-full"], timeout_s=30).split():
            link = root / "usr" / applet.removeprefix("usr/")
            if not os.path.lexists(link) and link.name not in ("busybox", "init", "linuxrc"):
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to("/bin/busybox")
        for name, text in guestfiles.MICRO_FILES.items():
            (root / name).write_text(text)
        for name, program in {
            "init": guestfiles.MICRO_INIT.encode(),
            guestfiles.AGENT: agent.binary(),
            guestfiles.SSH_ON_PORT: guestfiles.MICRO_SSH_ON_PORT.encode(),
        }.items():
            (root / name).write_bytes(program)
            (root / name).chmod(0o755)
        (root / "usr/sbin/init").symlink_to("/init")
        (root / HOST_KEY_IN_IMAGE.lstrip("/")).write_text(keys.public_openssh(host_key) + "\n")
        private = root / "etc/dropbear/dropbear_ed25519_host_key"
        private.write_bytes(keys.private_dropbear(host_key))
        (root / "root/.ssh/authorized_keys").write_text(self._public_key + "\n")
        for name, mode in {
            "etc/shadow": 0o600,
            "etc/dropbear/dropbear_ed25519_host_key": 0o600,
            "root": 0o700,
            "root/.ssh": 0o700,
            "root/.ssh/authorized_keys": 0o600,
            "tmp": 0o1777,
            "var/tmp": 0o1777,
        }.items():
            (root / name).chmod(mode)
        return root


def _find(tree: Path, name: str) -> Path:
    """A file of a package, which may or may not have moved under /usr (Debian 13 did)."""
    for candidate in (tree / name, tree / "usr" / name):
        if candidate.is_file():
            return candidate
    raise ImageError(f"the packages hold no {name}")


def _copy_libraries(packages: Path, root: Path) -> None:
    """Every shared library of the packages: guests run more than the SSH server."""
    for prefix in ("", "usr/"):
        for pattern in ("lib/*-linux-gnu*/*.so*", "lib64/*.so*"):
            for path in packages.glob(prefix + pattern):
                if path.is_file():
                    target = root / "usr" / path.relative_to(packages / prefix)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, target)
