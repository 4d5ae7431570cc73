"""The image ``micro``: a Debian kernel, busybox, dropbear, and nothing else.

Made from packages by unpacking, without root rights: no chroot, no loop device, no maintainer
scripts.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pytest_smolvm import keys
from pytest_smolvm.images import agent, ext4, guestfiles
from pytest_smolvm.images.cache import Progress
from pytest_smolvm.images.initrd import can_do_without_pci, make_initrd
from pytest_smolvm.images.kernel import kernel_file
from pytest_smolvm.images.manifest import HOST_KEY_IN_IMAGE, ImageManifest, write_manifest
from pytest_smolvm.images.toolbox import MODULES, MODULES_WITHOUT_PCI, Toolbox, ToolSource

FORMAT = 3
"""Raised whenever the same packages would make another image."""

_FOLDERS = [
    *("dev", "proc", "sys", "run", "tmp", "root/.ssh", "mnt", "home"),
    *("etc/dropbear", "etc/profile.d", "etc/smolvm", "var/log", "var/tmp"),
    *("usr/bin", "usr/lib/smolvm", "usr/lib64", "usr/local/bin", "usr/local/sbin"),
]


def recipe(architecture: str, size_mb: int) -> dict[str, object]:
    """What is asked for, as JSON: all that decides what it will be but packages and key."""
    return {
        "recipe": "micro",
        "format": FORMAT,
        "architecture": architecture,
        "size_mb": size_mb,
        "files": [
            *(guestfiles.initrd_init(MODULES, MODULES_WITHOUT_PCI), guestfiles.MICRO_INIT),
            guestfiles.MICRO_SSH_ON_PORT,
        ],
        "agent": hashlib.sha256(agent.binary(architecture)).hexdigest(),
        "more_files": guestfiles.MICRO_FILES,
    }


class MicroRecipe:
    """How ``micro`` is made, and from what: the two halves of its cache key."""

    def __init__(self, tools: ToolSource, architecture: str, public_key: str, size_mb: int) -> None:
        self._tools = tools
        self._architecture = architecture
        self._public_key = public_key
        self._size_mb = size_mb

    def inputs(self) -> dict[str, object]:
        """All that decides what the image will be, as JSON."""
        return {
            **recipe(self._architecture, self._size_mb),
            "packages": self._tools.inputs(),
            "public_key": self._public_key,
        }

    def build(self, target: Path, work: Path, name: str, say: Progress) -> None:
        """Make ``vmlinux``, ``vmlinux.initrd``, ``rootfs.ext4`` and its manifest in ``target``."""
        toolbox = self._tools.unpack(work)
        (target / "vmlinux").write_bytes(kernel_file(toolbox.kernel_image(), self._architecture))
        (target / "vmlinux.initrd").write_bytes(make_initrd(toolbox, toolbox.modules()))
        say("making the root disk")
        host_key = Ed25519PrivateKey.generate()
        root = self._make_tree(toolbox, host_key, work / "root")
        rootfs = target / "rootfs.ext4"
        ext4.make_ext4(root, rootfs, self._size_mb)
        write_manifest(
            rootfs,
            ImageManifest(
                name=name,
                host_key=keys.public_openssh(host_key),
                authorized_keys=[self._public_key],
                packages=toolbox.versions,
                agent=f"/{guestfiles.AGENT}" if toolbox.can_restore() else "",
                reads_boot_id=False,
                vsock=can_do_without_pci(toolbox.modules()),
            ),
        )

    def _make_tree(self, toolbox: Toolbox, host_key: Ed25519PrivateKey, root: Path) -> Path:
        for name in _FOLDERS:
            (root / name).mkdir(parents=True, exist_ok=True)
        # All programs lie in one folder, whatever the path that somebody knows them by.
        (root / "usr/sbin").symlink_to("bin")
        for name in ("bin", "sbin", "lib", "lib64"):
            (root / name).symlink_to(f"usr/{name}")
        shutil.copy(toolbox.busybox, root / "usr/bin/busybox")
        shutil.copy(toolbox.ssh_server, root / "usr/bin/dropbear")
        for path, source in toolbox.libraries().items():
            library = root / "usr" / path
            library.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, library)
        for applet in toolbox.applets:
            if applet not in ("busybox", "init", "linuxrc"):
                (root / "usr/bin" / applet).symlink_to("busybox")
        for name, text in guestfiles.MICRO_FILES.items():
            (root / name).write_text(text)
        for name, program in {
            "init": guestfiles.MICRO_INIT.encode(),
            guestfiles.AGENT: agent.binary(self._architecture),
            guestfiles.SSH_ON_PORT: guestfiles.MICRO_SSH_ON_PORT.encode(),
        }.items():
            (root / name).write_bytes(program)
            (root / name).chmod(0o755)
        (root / "usr/bin/init").symlink_to("/init")
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
