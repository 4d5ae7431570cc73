"""Building images, beside the tools that are called for it, and no more."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.table import alternate, row
from pytest_smolvm import ImageBuilder
from pytest_smolvm.images import bootstrap
from pytest_smolvm.images.debian import DEBIAN_NAMES, DebianPackages
from pytest_smolvm.images.toolbox import DEBIAN_KERNELS, DEBIAN_PACKAGES
from pytest_smolvm.limits import host_architecture


def building(rounds: int) -> list[str]:
    """``micro`` and Debian from an empty cache, and one that is there."""
    downloads = ImageBuilder().cache_dir / "debian"
    packages = DebianPackages(downloads, lambda _: None)
    wanted = packages.resolve(DEBIAN_PACKAGES, DEBIAN_KERNELS[host_architecture()])
    archives = packages.download(wanted)
    debian_rounds = max(2, rounds // 5)
    return [
        row(
            "image micro, packages downloaded",
            "<= 15 s",
            *alternate(rounds, lambda: _timed_build("micro", downloads), lambda: _micro(archives)),
        ),
        row(
            "image debian-12, with its download",
            "<= 90 s",
            *alternate(debian_rounds, lambda: _timed_build("debian-12", downloads), _debian),
        ),
        _found(rounds),
    ]


def _timed_build(name: str, downloads: Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "debian").symlink_to(downloads)
        builder = ImageBuilder(folder, progress=lambda _: None)
        return _timed(lambda: builder.build(name))


def _micro(archives: list[Path]) -> float:
    """The packages unpacked, and a file system made of what is not the kernel."""

    def make() -> None:
        for archive in archives:
            kind = "kernel" if archive.name.startswith("linux-image-") else "root"
            subprocess.run(["dpkg-deb", "-x", archive, folder / kind], check=True)
        _make_ext4(folder / "root", folder / "root.ext4", 128)

    with _folder() as folder:
        return _timed(make)


def _debian() -> float:
    """mmdebstrap, and a file system made of what it wrote."""

    def make() -> None:
        subprocess.run(
            [
                *("mmdebstrap", "--quiet", "--variant=apt"),
                *(f"--architectures={DEBIAN_NAMES[host_architecture()]}", "bookworm", tar),
                f"--include={','.join(bootstrap.PACKAGES)}",
            ],
            check=True,
        )
        (folder / "root").mkdir()
        subprocess.run(["tar", "-xf", tar, "-C", folder / "root"], check=True)
        _make_ext4(folder / "root", folder / "root.ext4", 2048)

    with _folder() as folder:
        tar = folder / "root.tar"
        return _timed(make)


def _found(rounds: int) -> str:
    builder = ImageBuilder(progress=lambda _: None)
    kernel, _ = builder.build("micro")
    rounds = max(20, rounds)
    times = alternate(
        rounds, lambda: _timed(lambda: builder.build("micro")), lambda: _timed(kernel.stat)
    )
    return row("an image that is there (stat of a file)", "<= 50 ms", *times)


def _make_ext4(root: Path, image: Path, size_mib: int) -> None:
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-d", root, image, f"{size_mib}m"], check=True)


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        yield Path(name)


def _timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began
