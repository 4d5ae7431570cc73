"""Images from a distribution, or from somebody's root file system: all that needs no guest."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pytest_smolvm.disks import fingerprint
from pytest_smolvm.errors import ImageError
from pytest_smolvm.images import alpine, alpine_root, bootstrap, importing, micro, rootfs
from pytest_smolvm.images.alpine import AlpinePackages
from pytest_smolvm.images.cache import (
    ImageCache,
    ImageFacts,
    Progress,
    StalePackagesError,
    check_space,
    facts_of,
)
from pytest_smolvm.images.debian import DEBIAN_NAMES
from pytest_smolvm.images.micro import MicroRecipe
from pytest_smolvm.images.recipes import NAME
from pytest_smolvm.images.toolbox import ToolSource, tools_for
from pytest_smolvm.keys import check_public_key, library_key_pair
from pytest_smolvm.limits import ARCHITECTURES, host_architecture
from pytest_smolvm.paths import expanded
from pytest_smolvm.process import ToolError
from pytest_smolvm.statedir import default_state_dir
from pytest_smolvm.store import Store

ROOTFS = "rootfs.ext4"
LAYERED_ROOTFS = "rootfs.qcow2"
_SMALLEST_ROOTFS_MB = 32
_SMALLEST_DEBIAN_MB = 512
_SMALLEST_ALPINE_MB = 64
_LARGEST_ROOTFS_MB = 1 << 20
_DEBIAN_BYTES = 1 << 30
_ALPINE_BYTES = 256 << 20
_IMPORT_BYTES = 64 << 20
_DEFAULT_DEBIAN = "13"
_DEBIANS = {"debian": _DEFAULT_DEBIAN, "debian-12": "12", "debian-13": "13"}
_MICRO_MB, _DEBIAN_MB, _ALPINE_MB = 128, 2048, 512


def print_progress(message: str) -> None:
    """The progress of a program with no screen of its own: lines on standard error."""
    print(f"pytest-smolvm: {message}", file=sys.stderr, flush=True)  # noqa: T201


@dataclass(frozen=True)
class _Root:
    """A root file system that is to become an image."""

    name: str
    architecture: str
    origin: str
    recipe: Mapping[str, object]
    """What is asked for, as JSON."""
    make: importing.MakeRoot
    mirror: str | None = None
    kernel: Path | None = None
    space_bytes: int = _IMPORT_BYTES
    """What must be free on the disk before it is begun."""


class DistributionBuilder:
    """The part of ``ImageBuilder`` that makes images without booting any."""

    def __init__(
        self,
        cache_dir: Path | str | None = None,
        *,
        progress: Progress | None = None,
        make_missing: bool = True,
    ) -> None:
        state = default_state_dir()
        self._cache = ImageCache(Path(cache_dir) if cache_dir else state / "images")
        self._state = state
        self._make_missing = make_missing
        self._progress = progress if progress is not None else print_progress

    @property
    def cache_dir(self) -> Path:
        """Where the images lie."""
        return self._cache.root

    def _build_stock(self, name: str, arch: str | None) -> tuple[Path, Path]:
        """The built-in image called ``name``, one of ``IMAGES``."""
        if name == "micro":
            return self.build_micro_ssh_key(arch=arch)
        if _check_architecture(arch) != host_architecture():
            raise ImageError(
                f"the image {name!r} can be had for this host's processor only, not for {arch}: "
                f"'micro' can be had for {', '.join(ARCHITECTURES)}, and from_rootfs takes a root "
                "file system for either"
            )
        if name == "alpine":
            return self.build_alpine_ssh_key()
        return self.build_debian_ssh_key(name=name, release=_DEBIANS[name])

    def _stock_recipe(self, name: str, arch: str | None) -> Mapping[str, object]:
        """What is asked for by that name."""
        architecture = _check_architecture(arch)
        if name == "micro":
            return {**micro.recipe(architecture, _MICRO_MB), "public_key": None}
        if name == "alpine":
            root = alpine_root.recipe(alpine.DEFAULT_RELEASE, _ALPINE_MB)
        else:
            root = bootstrap.recipe(bootstrap.suite_of(_DEBIANS[name]), _DEBIAN_MB)
        return with_companion(root, architecture, None)

    def build_micro_ssh_key(
        self,
        public_key: str | None = None,
        name: str = "micro",
        rootfs_size_mb: int = _MICRO_MB,
        *,
        arch: str | None = None,
    ) -> tuple[Path, Path]:
        """The image ``micro`` (busybox and dropbear on a Debian kernel), built if need be.

        ``public_key``, one line in OpenSSH's format, is the key that may log in as
        root; None: the pair that the library keeps for itself. ``rootfs_size_mb`` is
        the root disk's size in MiB, 32 or more. ``arch``: ``x86_64`` or ``aarch64``;
        None: this host's. Returns the paths of kernel and root disk; the initial RAM
        disk lies beside the kernel. Raises ``ImageError``.
        """
        architecture = _check_architecture(arch)
        _check_size(rootfs_size_mb, _SMALLEST_ROOTFS_MB)
        key = self._public_key(public_key)
        recipe = {**micro.recipe(architecture, rootfs_size_mb), "public_key": public_key}
        with self._building(name) as say:
            if imported := self._find_imported(name, recipe):
                return imported

            def get(tools: ToolSource) -> tuple[Path, Path]:
                made_of = MicroRecipe(tools, architecture, key, rootfs_size_mb)

                def build(target: Path, work: Path) -> None:
                    made_of.build(target, work, name, say)

                facts = facts_of(name, architecture, "busybox", recipe)
                return self._get(name, made_of.inputs(), facts, build, say)

            return self._with_tools(architecture, say, get)

    def build_debian_ssh_key(
        self,
        public_key: str | None = None,
        name: str = "debian",
        rootfs_size_mb: int = _DEBIAN_MB,
        *,
        release: str = _DEFAULT_DEBIAN,
        mirror: str | None = None,
    ) -> tuple[Path, Path]:
        """A Debian with apt and Python 3 (built if need be, with mmdebstrap).

        ``release``: ``"12"`` or ``"13"``, or its code name. ``mirror``: the archive to take it
        from; None: mmdebstrap's default. The other arguments, what is returned and what is
        raised are those of ``build_micro_ssh_key``; ``rootfs_size_mb`` is 512 or more.
        """
        suite = bootstrap.suite_of(release)
        _check_size(rootfs_size_mb, _SMALLEST_DEBIAN_MB)
        architecture = host_architecture()

        def make_root(image: Path, work: Path) -> None:
            tar = work / "debian.tar"
            bootstrap.make_debian_tar(
                suite, bootstrap.PACKAGES, DEBIAN_NAMES[architecture], mirror, tar, say
            )
            rootfs.make_image(tar, image, work, rootfs_size_mb, say)

        recipe = bootstrap.recipe(suite, rootfs_size_mb)
        root = _Root(
            name,
            architecture,
            f"Debian {suite}",
            recipe,
            make_root,
            mirror,
            space_bytes=_DEBIAN_BYTES,
        )
        with self._building(name) as say:
            return self._import(root, public_key, say)

    def build_alpine_ssh_key(
        self,
        public_key: str | None = None,
        name: str = "alpine",
        rootfs_size_mb: int = _ALPINE_MB,
        *,
        release: str = alpine.DEFAULT_RELEASE,
        mirror: str | None = None,
    ) -> tuple[Path, Path]:
        """An Alpine with apk and OpenRC (built if need be, with Alpine's own apk).

        ``release``: ``"3.23"``, say. ``mirror``: the URL of the mirror to take it from (http, https
        or file); None: ``SMOLVM_ALPINE_MIRROR``, or Alpine's own. What comes from there is checked
        by Alpine's keys, which this library has; ``SMOLVM_ALPINE_KEYS`` names a folder of others.
        The other arguments, what is returned and what is raised are those of
        ``build_micro_ssh_key``; ``rootfs_size_mb`` is 64 or more.
        """
        alpine_root.check_release(release)
        _check_size(rootfs_size_mb, _SMALLEST_ALPINE_MB)
        architecture = host_architecture()
        source = alpine.mirror_of(mirror)

        def make_root(image: Path, work: Path) -> None:
            packages = AlpinePackages(self.cache_dir / "alpine", source, release, architecture, say)
            tar = work / "alpine.tar"
            alpine_root.make_alpine_tar(packages, architecture, work, tar, say)
            rootfs.make_image(tar, image, work, rootfs_size_mb, say)

        recipe = alpine_root.recipe(release, rootfs_size_mb)
        root = _Root(
            name,
            architecture,
            f"Alpine {release}",
            recipe,
            make_root,
            source,
            space_bytes=_ALPINE_BYTES,
        )
        with self._building(name) as say:
            return self._import(root, public_key, say)

    def from_rootfs(
        self,
        source: Path | str,
        kernel: Path | str | None = None,
        *,
        name: str | None = None,
        rootfs_size_mb: int | None = None,
        public_key: str | None = None,
        arch: str | None = None,
    ) -> tuple[Path, Path]:
        """An image of a root file system that knows nothing of this project.

        ``source``: a directory; a tar archive, compressed or not (``docker export``); an ext4
        disk, raw or qcow2, partitioned or not. It is not changed, and what is made of it boots to
        SSH, whatever its C library. ``kernel``: the kernel to boot; None: the root disk's own, if
        one lies in its /boot with its modules, else that of the image ``micro``.
        ``rootfs_size_mb``: the root disk's size in MiB; None: twice what it is to hold, 1024 at the
        least, or the size that the disk has. ``name`` (default: made of the file's) and
        ``public_key`` are as for ``build_micro_ssh_key``, as is what is returned and raised.
        ``arch``: the processor that it is for; None: this host's.

        Made once for the same contents; of a directory, what counts is the names, sizes and times
        of what is in it.
        """
        path = expanded(source).absolute()
        kernel_path = expanded(kernel).absolute() if kernel else None
        architecture = _check_architecture(arch)
        if rootfs_size_mb is not None:
            _check_size(rootfs_size_mb, _SMALLEST_ROOTFS_MB)
        for what, given in (("root file system", path), ("kernel", kernel_path)):
            if given is not None and not given.exists():
                raise ImageError(
                    f"the {what} {given} does not exist: give the path of one", {"path": str(given)}
                )
        made_name = name or _name_of(path)

        def make_root(image: Path, work: Path) -> None:
            rootfs.make_image(path, image, work, rootfs_size_mb, say)

        with self._building(made_name) as say:
            recipe = self._rootfs_recipe(path, kernel_path, rootfs_size_mb)
            root = _Root(made_name, architecture, str(path), recipe, make_root, kernel=kernel_path)
            return self._import(root, public_key, say)

    # -- within -----------------------------------------------------------------

    def _rootfs_recipe(
        self, source: Path, kernel: Path | None, size_mb: int | None
    ) -> dict[str, object]:
        memory = Store(self._state).cache
        return {
            "rootfs": _contents(source, memory),
            "kernel": fingerprint(kernel, memory) if kernel else None,
            "size_mb": size_mb,
        }

    def _import(self, root: _Root, public_key: str | None, say: Progress) -> tuple[Path, Path]:
        key = self._public_key(public_key)
        recipe = with_companion(root.recipe, root.architecture, public_key)
        if imported := self._find_imported(root.name, recipe):
            return imported

        def get(tools: ToolSource) -> tuple[Path, Path]:
            def build(target: Path, work: Path) -> None:
                check_space(work, root.space_bytes, f"building the image {root.name!r}")
                importing.build_image(
                    root.name,
                    root.make,
                    tools,
                    root.architecture,
                    key,
                    root.kernel,
                    target,
                    work,
                    say,
                )

            inputs = {
                **recipe,
                "mirror": root.mirror,
                "packages": tools.inputs(),
                "public_key": key,
            }
            facts = facts_of(root.name, root.architecture, root.origin, recipe)
            return self._get(root.name, inputs, facts, build, say)

        return self._with_tools(root.architecture, say, get)

    def _with_tools(
        self,
        architecture: str,
        say: Progress,
        get: Callable[[ToolSource], tuple[Path, Path]],
    ) -> tuple[Path, Path]:
        """What ``get`` makes with the tools; once more with newer ones if those cannot be had."""
        tools = tools_for(self.cache_dir, architecture, say)
        try:
            return get(tools)
        except StalePackagesError:
            if not tools.refresh():
                raise
            return get(tools_for(self.cache_dir, architecture, say))

    def _get(
        self,
        name: str,
        inputs: Mapping[str, object],
        facts: ImageFacts,
        build: Callable[[Path, Path], None],
        say: Progress,
    ) -> tuple[Path, Path]:
        if not self._make_missing and self._cache.find(name, inputs) is None:
            raise ImageError(f"the image {name!r} has not been built", {"name": name})
        return paths_in(self._cache.get(name, inputs, facts, build, say))

    def _find_imported(self, name: str, recipe: Mapping[str, object]) -> tuple[Path, Path] | None:
        found = self._cache.find_imported(name, recipe)
        return paths_in(found) if found is not None else None

    def _public_key(self, given: str | None) -> str:
        try:
            if given is not None:
                return check_public_key(given)
            return library_key_pair(Store(self._state)).public_key
        except ValueError as error:
            raise ImageError(str(error)) from None

    @contextmanager
    def _building(self, name: str) -> Iterator[Progress]:
        """Errors name the image; what is said does, too, and how long it has taken so far."""
        if not NAME.fullmatch(name):
            raise ImageError(
                f"{name!r} is no name for an image: use lowercase letters, digits, dots, hyphens "
                "and underscores, such as 'my-micro'"
            )
        started = time.monotonic()

        def say(message: str) -> None:
            self._progress(f"image {name}: {message} [{time.monotonic() - started:.1f} s]")

        try:
            yield say
        except ToolError as error:
            raise ImageError(f"the image {name!r} cannot be built: {error.message}") from error
        except OSError as error:
            raise ImageError(
                f"the image {name!r} cannot be built in {self.cache_dir}: {error}"
            ) from error


def paths_in(image: Path) -> tuple[Path, Path]:
    """Kernel and root disk in the directory of an image."""
    layered = image / LAYERED_ROOTFS
    return image / "vmlinux", layered if layered.exists() else image / ROOTFS


def with_companion(
    root: Mapping[str, object], architecture: str, public_key: str | None
) -> dict[str, object]:
    """What is asked for: a root file system, what is added to it, and for whom."""
    return {**root, **importing.recipe(architecture), "public_key": public_key}


def _check_architecture(given: str | None) -> str:
    name = given or host_architecture()
    if name not in ARCHITECTURES:
        raise ImageError(f"arch={name!r} is not valid: use one of {', '.join(ARCHITECTURES)}")
    return name


def _check_size(size_mb: int, smallest: int) -> None:
    if not smallest <= size_mb <= _LARGEST_ROOTFS_MB:
        raise ImageError(
            f"rootfs_size_mb={size_mb} is out of range: give {smallest} to {_LARGEST_ROOTFS_MB} MiB"
        )


def _name_of(path: Path) -> str:
    """A name for the image of a file: its own, without what it ends in."""
    stem = re.sub(r"\.(tar(\.\w+)?|tgz|qcow2|ext4|img|raw)$", "", path.name.lower())
    return re.sub(r"[^a-z0-9._-]+", "-", stem).strip("._-")[:64].strip("._-") or "imported"


def _contents(path: Path, memory: Path) -> str:
    """Changes whenever what is imported does."""
    if not path.is_dir():
        return fingerprint(path, memory)
    digest = hashlib.sha256()
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(folders + files):
            entry = Path(folder, name)
            facts = entry.lstat()
            digest.update(
                f"{entry.relative_to(path)}\0{facts.st_mode}\0{facts.st_uid}\0{facts.st_gid}"
                f"\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode("utf-8", "surrogateescape")
            )
    return digest.hexdigest()
