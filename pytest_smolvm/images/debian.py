"""Debian packages as an ordinary user: resolved, downloaded and unpacked by apt and dpkg.

apt gets a state of its own in the cache directory, with an empty package
database, so that it neither needs root rights nor looks at what the host has
installed. It uses the host's sources and keys, and the host's package lists
where there are any.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pytest_smolvm.errors import ImageError
from pytest_smolvm.images.cache import Progress, StalePackagesError
from pytest_smolvm.limits import host_architecture
from pytest_smolvm.process import ToolError, find_tool, run_tool
from pytest_smolvm.statedir import make_private_dir, read_json, write_json

_HOST_LISTS = Path("/var/lib/apt/lists")
_HOST_SOURCES = Path("/etc/apt")
_APT_TIMEOUT_S = 900
_FORMAT = 2  # raised whenever the same lists would be understood otherwise

DEBIAN_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}
"""Debian's names for architectures, by the kernel's."""


@dataclass(frozen=True, order=True)
class Package:
    """One package file, as apt names it."""

    name: str
    version: str
    file_name: str
    size_bytes: int


class DebianPackages:
    """Packages of the host's own Debian release, kept in ``cache``.

    ``architecture``: whose packages, as the kernel calls it; those of another than the host's
    are looked up in package lists of our own.
    """

    def __init__(self, cache: Path, progress: Progress, architecture: str = "x86_64") -> None:
        self._architecture = DEBIAN_NAMES[architecture]
        self._is_foreign = architecture != host_architecture()
        self._cache = make_private_dir(cache / architecture if self._is_foreign else cache)
        self._progress = progress
        self._apt_get = find_tool("apt-get", "apt")
        self._apt_cache = find_tool("apt-cache", "apt")
        self._dpkg_deb = find_tool("dpkg-deb", "dpkg")
        self._own_lists = False
        for name in ("lists/partial", "archives", "apt/archives/partial"):
            (self._cache / name).mkdir(parents=True, exist_ok=True)
        (self._cache / "status").touch()

    def resolve(self, packages: Iterable[str], kernels: Iterable[str]) -> list[Package]:
        """What must be downloaded for ``packages`` with all that they depend on, and for
        the first of ``kernels`` that this release has, without what it depends on.

        Remembered until the host's package lists or sources change.
        """
        packages, kernels = list(packages), list(kernels)
        self._settle_lists()
        stamp = self._stamp(packages, kernels)
        memory = self._cache / f"resolved-{stamp}.json"
        known = read_json(memory)
        if known is None:
            known = [
                [p.name, p.version, p.file_name, p.size_bytes]
                for p in self._resolve(packages, kernels)
            ]
            for old in self._cache.glob("resolved-*.json"):
                old.unlink(missing_ok=True)
            write_json(memory, known)
        return [Package(*entry) for entry in known]

    def download(self, packages: Iterable[Package]) -> list[Path]:
        """The package files, from the cache or from the archive; checked by apt's hashes."""
        packages = list(packages)
        missing = [p for p in packages if not (self._cache / "archives" / p.file_name).exists()]
        if missing:
            megabytes = sum(p.size_bytes for p in missing) / 1e6
            self._progress(f"downloading {len(missing)} Debian packages, {megabytes:.0f} MB")
            try:
                self._download(missing)
            except ToolError as error:
                raise StalePackagesError(
                    "Debian packages could not be downloaded; is the network up, and are the "
                    f"package lists fresh (apt-get update)?\n{error.message}"
                ) from error
        return [self._cache / "archives" / p.file_name for p in packages]

    def refresh(self) -> bool:
        """Fetch the package lists anew, if they are our own; False: they are the host's."""
        if self._own_lists:
            self._update_lists()
        return self._own_lists

    def unpack(self, archive: Path, target: Path) -> None:
        """Unpack one package's files (no maintainer scripts) into ``target``."""
        target.mkdir(parents=True, exist_ok=True)
        run_tool([self._dpkg_deb, "-x", str(archive), str(target)], timeout_s=300)

    def _settle_lists(self) -> None:
        if any(_HOST_LISTS.glob("*_Packages*")) and not self._is_foreign:
            return
        self._own_lists = True
        if not any((self._cache / "lists").glob("*_Packages*")):
            of = f" for {self._architecture}" if self._is_foreign else ""
            self._progress(f"fetching Debian's package lists{of} (this host has none)")
            self._update_lists()

    def _update_lists(self) -> None:
        try:
            self._run(self._apt_get, "-qq", "update")
        except ToolError as error:
            raise ImageError(
                f"Debian's package lists could not be fetched; is the network up?\n{error.message}"
            ) from error

    def _resolve(self, packages: list[str], kernels: list[str]) -> list[Package]:
        try:
            text = self._run(self._apt_get, "-qq", "-y", "install", "--print-uris", *packages)
            text += self._run(
                self._apt_get, "-qq", "download", "--print-uris", self._choose_kernel(kernels)
            )
        except ToolError as error:
            raise ImageError(
                f"apt cannot resolve {', '.join(packages)}; are the package lists fresh "
                f"(apt-get update)?\n{error.message}"
            ) from error
        found = sorted(_parse_uris(text))
        unnamed = set(packages) - {package.name for package in found}
        if unnamed:
            raise ImageError(
                f"apt did not say where {', '.join(sorted(unnamed))} can be had; it said:\n{text}"
            )
        return found

    def _choose_kernel(self, names: list[str]) -> str:
        """The package with the files behind the first meta package that there is."""
        for name in names:
            with contextlib.suppress(ToolError):  # apt-cache's answer to an unknown name
                text = self._run(self._apt_cache, "show", "--no-all-versions", name)
                depends = re.search(r"^Depends: (linux-image-\S+)", text, re.MULTILINE)
                if depends:
                    return depends.group(1).rstrip(",")
        raise ImageError(
            f"this host's package sources have none of the kernels {', '.join(names)}: "
            "run apt-get update, or give kernel and root disk by path",
            {"kernels": names},
        )

    def _download(self, packages: list[Package]) -> None:
        # Into a folder of its own: apt writes a file in place, so one that was
        # killed half-way would look whole to the next run.
        with tempfile.TemporaryDirectory(dir=self._cache, prefix="download-") as folder:
            self._run(
                self._apt_get,
                "-qq",
                "download",
                *(f"{p.name}={p.version}" for p in packages),
                cwd=Path(folder),
            )
            for path in Path(folder).iterdir():
                path.replace(self._cache / "archives" / path.name)
        absent = [
            p.file_name for p in packages if not (self._cache / "archives" / p.file_name).exists()
        ]
        if absent:
            raise ImageError(f"apt-get did not download {', '.join(absent)}: run apt-get update")

    def _run(self, tool: str, *arguments: str, cwd: Path | None = None) -> str:
        options = {
            "Dir::State::status": str(self._cache / "status"),
            # Not where our package files lie: apt would leave those out of its answers.
            "Dir::Cache": str(self._cache / "apt"),
            "APT::Install-Recommends": "false",
            # Root would otherwise download as a user that cannot write to our folder.
            "APT::Sandbox::User": "root",
            "Debug::NoLocking": "1",
            "APT::Architecture": self._architecture,
            "APT::Architectures": self._architecture,
        }
        if self._own_lists:
            options["Dir::State::lists"] = str(self._cache / "lists")
        flags = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
        return run_tool(
            [tool, *flags, *arguments], timeout_s=_APT_TIMEOUT_S, cwd=cwd, env={"LC_ALL": "C"}
        )

    def _stamp(self, packages: list[str], kernels: list[str]) -> str:
        """Changes whenever apt might answer differently."""
        lists = self._cache / "lists" if self._own_lists else _HOST_LISTS
        digest = hashlib.sha256(repr((_FORMAT, packages, kernels)).encode())
        for folder in (lists, _HOST_SOURCES, _HOST_SOURCES / "sources.list.d"):
            with contextlib.suppress(OSError):
                for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                    if entry.is_file():
                        facts = entry.stat()
                        digest.update(
                            f"{entry.path} {facts.st_size} {facts.st_mtime_ns}\n".encode()
                        )
        return digest.hexdigest()[:16]


_URI_LINE = re.compile(r"^'[^']*' (?P<file>\S+_(?P<version>[^_\s]+)_[^_\s]+\.deb) (?P<size>\d+)")


def _parse_uris(text: str) -> list[Package]:
    """Packages out of ``--print-uris`` lines: 'URI' NAME_VERSION_ARCH.deb SIZE HASH."""
    found = []
    for line in text.splitlines():
        match = _URI_LINE.match(line)
        if match:
            name = match["file"].split("_")[0]
            version = match["version"].replace("%3a", ":")
            found.append(Package(name, version, match["file"], int(match["size"])))
    return found
