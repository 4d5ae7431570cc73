"""What every guest gets from us: a kernel, busybox, an SSH server with its libraries.

They come from a distribution's packages, unpacked: Debian's where the host has apt, Alpine's
anywhere else. What is made of them (the image ``micro``, the initial RAM disks, an SSH server for
imported images) does not care which.
"""

from __future__ import annotations

import re
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pytest_smolvm.errors import ImageError
from pytest_smolvm.images import alpine
from pytest_smolvm.images.alpine import AlpinePackages
from pytest_smolvm.images.cache import Progress
from pytest_smolvm.images.debian import DebianPackages
from pytest_smolvm.images.kernel import ELF_MAGIC

# In order of preference. The cloud kernels are half the size of the generic
# one and boot as fast; from 6.12 on they have vmgenid built in, which lets a
# guest reseed its random pool by itself when it is restored from a snapshot.
DEBIAN_KERNELS = {
    "x86_64": ["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64", "linux-image-amd64"],
    "aarch64": ["linux-image-6.12-cloud-arm64", "linux-image-cloud-arm64", "linux-image-arm64"],
}
DEBIAN_PACKAGES = ["busybox-static", "dropbear-bin"]
ALPINE_KERNEL = "linux-virt"
ALPINE_PACKAGES = ["busybox-static", "dropbear"]

MODULES = [
    *("virtio_pci", "virtio_blk", "ext4", "crc32c_generic"),
    *("virtio_net", "virtio_rng", "virtio_console"),
]
"""What a guest needs to get at its root disk, its network and its console's port."""

MODULES_WITHOUT_PCI = ["virtio_mmio", "vmw_vsock_virtio_transport"]
"""What it needs besides on a machine without PCI, whose only way in is vsock: loaded where the
kernel's command line has the word ``guestfiles.WITHOUT_PCI``."""

_LIBRARY_FOLDERS = ("lib/*-linux-gnu*/*.so*", "lib64/*.so*", "lib/*.so*")
_PT_INTERP = 3


@dataclass(frozen=True)
class Toolbox:
    """The tools, unpacked on the host."""

    packages: Path
    """The files of all packages but the kernel's."""
    kernel: Path
    """Those of the kernel's package: ``boot/vmlinuz-*`` and ``lib/modules``."""
    versions: dict[str, str]

    @property
    def busybox(self) -> Path:
        """A static busybox."""
        return self.find("bin/busybox.static", "bin/busybox")

    @property
    def applets(self) -> list[str]:
        """What that busybox can be, read out of it: it may be for another kind of processor."""
        # The names lie there one after the other, sorted, each ended by a NUL; "[" comes first.
        found = re.search(rb"\[\0\[\[\0(?:[a-z0-9_.+-]+\0){100,}", self.busybox.read_bytes())
        if found is None:
            raise ImageError(f"{self.busybox} does not tell what it can be: it is of another kind")
        return found.group(0).decode().rstrip("\0").split("\0")

    @property
    def ssh_server(self) -> Path:
        """dropbear."""
        return self.find("sbin/dropbear")

    def find(self, *names: str) -> Path:
        """A file of the packages, which may or may not have moved under /usr (Debian 13 did)."""
        for name in names:
            for candidate in (self.packages / name, self.packages / "usr" / name):
                if candidate.is_file():
                    return candidate
        raise ImageError(f"the packages hold no {names[0]}")

    def libraries(self) -> dict[Path, Path]:
        """Every shared library of the packages, by the path that it has under /usr."""
        found = {}
        for prefix in ("", "usr/"):
            for pattern in _LIBRARY_FOLDERS:
                for path in self.packages.glob(prefix + pattern):
                    if path.is_file():
                        found[path.relative_to(self.packages / prefix)] = path
        return found

    def interpreter(self) -> Path:
        """The dynamic linker that the SSH server asks for."""
        name = program_interpreter(self.ssh_server.read_bytes())
        for path in self.libraries().values():
            if path.name == Path(name.decode()).name:
                return path
        raise ImageError(f"the packages hold no {name.decode()}, which dropbear needs")

    def can_restore(self) -> bool:
        """Whether guests with these tools can be restored.

        With musl, dropbear ends on the Unix socket that the agent gives it: it cannot name who is
        at the other end (getnameinfo(3) knows only internet addresses there). Such guests boot.
        """
        return "musl" not in self.interpreter().name

    def kernel_image(self) -> Path:
        """The kernel as its package has it."""
        found = next((self.kernel / "boot").glob("vmlinuz-*"), None)
        if found is None:
            raise ImageError(f"no /boot/vmlinuz-* in the kernel package under {self.kernel}")
        return found

    def modules(self) -> Path:
        """The folder of the kernel's modules, called like its release."""
        for prefix in ("", "usr/"):
            for path in (self.kernel / prefix / "lib/modules").glob("*"):
                return path
        raise ImageError(f"no /lib/modules in the kernel package under {self.kernel}")


class ToolSource(Protocol):
    """Where the tools come from."""

    def inputs(self) -> object:
        """All that decides what they will be, as JSON; quick, once it has been asked before."""
        ...

    def unpack(self, work: Path) -> Toolbox:
        """Fetch them, if need be, and unpack them under ``work``. ``StalePackagesError``."""
        ...

    def refresh(self) -> bool:
        """Look anew at what there is; False: that is the host's business."""
        ...


class DebianTools:
    """The tools from packages of the host's own Debian release."""

    def __init__(self, downloads: Path, architecture: str, progress: Progress) -> None:
        self._progress = progress
        self._debian = DebianPackages(downloads, progress, architecture)
        self._packages = self._debian.resolve(DEBIAN_PACKAGES, DEBIAN_KERNELS[architecture])

    def inputs(self) -> object:
        return [[package.name, package.version] for package in self._packages]

    def unpack(self, work: Path) -> Toolbox:
        archives = self._debian.download(self._packages)
        self._progress("unpacking the kernel")
        kernel, packages = work / "kernel", work / "packages"
        for package, archive in zip(self._packages, archives, strict=True):
            is_kernel = package.name.startswith("linux-image-")
            self._debian.unpack(archive, kernel if is_kernel else packages)
        versions = {package.name: package.version for package in self._packages}
        return Toolbox(packages, kernel, versions)

    def refresh(self) -> bool:
        return self._debian.refresh()


class AlpineTools:
    """The tools from packages of an Alpine release, on a host that has no apt."""

    def __init__(self, downloads: Path, architecture: str, progress: Progress) -> None:
        self._progress = progress
        mirror = alpine.mirror_of(None)
        self._alpine = AlpinePackages(
            downloads, mirror, alpine.DEFAULT_RELEASE, architecture, progress
        )
        self._packages = self._alpine.resolve(ALPINE_PACKAGES, [ALPINE_KERNEL])

    def inputs(self) -> object:
        return [[package.name, package.version, package.checksum] for package in self._packages]

    def unpack(self, work: Path) -> Toolbox:
        archives = self._alpine.download(self._packages)
        self._progress("unpacking the kernel")
        kernel, packages = work / "kernel", work / "packages"
        for package, archive in zip(self._packages, archives, strict=True):
            self._alpine.unpack(archive, kernel if package.name == ALPINE_KERNEL else packages)
        versions = {package.name: package.version for package in self._packages}
        return Toolbox(packages, kernel, versions)

    def refresh(self) -> bool:
        self._alpine.refresh()
        return True


def tools_for(cache: Path, architecture: str, progress: Progress) -> ToolSource:
    """From where this host can have the tools: Debian's packages by its own apt, or Alpine's."""
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        return DebianTools(cache / "debian", architecture, progress)
    return AlpineTools(cache / "alpine", architecture, progress)


def program_interpreter(program: bytes) -> bytes:
    """The dynamic linker that an ELF program (64 bits, little-endian) asks for: elf(5)."""
    start, length = _interpreter_at(program)
    return program[start : start + length].rstrip(b"\0")


def with_interpreter(program: bytes, path: str) -> bytes:
    """``program``, asking for another dynamic linker, whose path is not longer than the first."""
    start, length = _interpreter_at(program)
    if len(path) >= length:
        raise ImageError(f"the path {path} does not fit into the program: it has {length} bytes")
    return program[:start] + path.encode().ljust(length, b"\0") + program[start + length :]


def _interpreter_at(program: bytes) -> tuple[int, int]:
    if program[:4] != ELF_MAGIC:
        raise ImageError("the SSH server is not an ELF program")
    table, size, count = (
        *struct.unpack_from("<Q", program, 32),
        *struct.unpack_from("<HH", program, 54),
    )
    for number in range(count):
        kind, _, start, _, _, length = struct.unpack_from("<IIQQQQ", program, table + number * size)
        if kind == _PT_INTERP:
            return start, length
    raise ImageError("the SSH server asks for no dynamic linker")
