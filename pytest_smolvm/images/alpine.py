"""Alpine's packages as any host can have them: from a mirror, checked, and unpacked by us.

Nothing is believed but what one of Alpine's own keys has signed; those are part of this library
(``alpine_keys``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from pytest_smolvm.errors import ImageError
from pytest_smolvm.images import apk
from pytest_smolvm.images.apk import IndexedPackage
from pytest_smolvm.images.cache import Progress, StalePackagesError
from pytest_smolvm.images.download import NotThereError, download
from pytest_smolvm.paths import expanded
from pytest_smolvm.statedir import read_json, write_json

MIRROR_VARIABLE = "SMOLVM_ALPINE_MIRROR"
KEYS_VARIABLE = "SMOLVM_ALPINE_KEYS"
DEFAULT_MIRROR = "https://dl-cdn.alpinelinux.org/alpine"
DEFAULT_RELEASE = "3.23"

_KEYS = Path(__file__).parent / "alpine_keys"
_REPOSITORY = "main"
_INDEX = "APKINDEX.tar.gz"
_FORMAT = 1  # raised whenever the same index would be understood otherwise
_SCHEMES = ("http://", "https://", "file:///")


def mirror_of(given: str | None) -> str:
    """The mirror to use: what is given, or ``SMOLVM_ALPINE_MIRROR``, or Alpine's own."""
    mirror = (given or os.environ.get(MIRROR_VARIABLE) or DEFAULT_MIRROR).rstrip("/")
    if not mirror.startswith(_SCHEMES):
        raise ImageError(
            f"{mirror!r} is no mirror of Alpine: give the URL of one, such as {DEFAULT_MIRROR}, as "
            f"mirror= or in {MIRROR_VARIABLE}"
        )
    return mirror


def keys_folder(architecture: str) -> Path:
    """Where the public keys lie that are trusted: ``SMOLVM_ALPINE_KEYS``, or Alpine's own."""
    given = os.environ.get(KEYS_VARIABLE)
    return expanded(given).absolute() if given else _KEYS / architecture


class AlpinePackages:
    """The packages of one Alpine release on a mirror, kept in ``cache``."""

    def __init__(
        self, cache: Path, mirror: str, release: str, architecture: str, progress: Progress
    ) -> None:
        self.repository = f"{mirror}/v{release}/{_REPOSITORY}"
        self._base = f"{self.repository}/{architecture}"
        self._keys = keys_folder(architecture)
        self._progress = progress
        # Names of what lies there: one folder per mirror, which may differ in age.
        self._folder = cache / self._base.partition("://")[2].strip("/").replace("/", "_")

    def resolve(self, packages: Iterable[str], alone: Iterable[str] = ()) -> list[IndexedPackage]:
        """``packages`` with what they depend on, and ``alone`` without.

        The index is fetched once, and kept until ``refresh``; so is the answer.
        """
        packages, alone = list(packages), list(alone)
        keys = apk.read_keys(self._keys)
        index = self._fetch_index(keys, self._folder / _INDEX)
        facts = index.stat()
        question = [_FORMAT, packages, alone, sorted(keys), facts.st_size, facts.st_mtime_ns]
        name = hashlib.sha256(repr((packages, alone)).encode()).hexdigest()[:16]
        memory = self._folder / f"resolved-{name}.json"
        known = read_json(memory)
        if known is None or known["question"] != question:
            found = self._resolve(index, keys, packages, alone)
            answer = [[p.name, p.version, p.checksum, p.size_bytes] for p in found]
            known = {"question": question, "answer": answer}
            write_json(memory, known)
        return [IndexedPackage(*entry) for entry in known["answer"]]

    def download(self, packages: Iterable[IndexedPackage]) -> list[Path]:
        """The package files, each what the signed index says. ``StalePackagesError``."""
        packages = list(packages)
        paths = [self._folder / "packages" / package.file_name for package in packages]
        missing = [
            p.size_bytes for p, path in zip(packages, paths, strict=True) if not path.exists()
        ]
        if missing:
            megabytes = sum(missing) / 1e6
            self._progress(f"downloading {len(missing)} Alpine packages, {megabytes:.0f} MB")
        for package, path in zip(packages, paths, strict=True):
            url = f"{self._base}/{package.file_name}"
            if path.exists():
                try:
                    apk.check_package(path, package)
                    continue
                except ImageError:
                    path.unlink()  # another build of the same version, or a damaged disk
            try:
                download(url, path, partial(apk.check_package, package=package))
            except NotThereError as error:
                raise StalePackagesError(
                    f"the mirror has no {url}, of which its index told: it has been renewed since",
                    {"url": url},
                ) from error
        return paths

    def unpack(self, archive: Path, target: Path) -> None:
        """Unpack one package's files (no scripts are run) into ``target``."""
        target.mkdir(parents=True, exist_ok=True)
        apk.unpack_package(archive, target)

    def refresh(self) -> None:
        """Fetch the index anew. ``ImageError``; the one of before is there still, then."""
        index = self._folder / _INDEX
        fresh = self._fetch_index(apk.read_keys(self._keys), index.with_name(f"{_INDEX}.new"))
        fresh.replace(index)

    def _resolve(
        self, index: Path, keys: Mapping[str, RSAPublicKey], packages: list[str], alone: list[str]
    ) -> list[IndexedPackage]:
        known = apk.read_index(index.read_bytes(), keys, f"{self._base}/{index.name}")
        found = apk.resolve(known, packages, self._base)
        by_name = {package.name: package for package in known}
        for name in alone:
            if name not in by_name:
                raise ImageError(f"{self._base} has no package {name}", {"package": name})
            found.append(by_name[name])
        return found

    def _fetch_index(self, keys: Mapping[str, RSAPublicKey], path: Path) -> Path:
        url = f"{self._base}/{_INDEX}"
        if not path.exists():
            self._progress(f"fetching the index of {self._base}")
            try:
                download(url, path, lambda file: _check_index(file, keys, url))
            except NotThereError as error:
                raise ImageError(
                    f"{error.message}: this is no mirror of Alpine, or it has no such release; set "
                    f"{MIRROR_VARIABLE} to one that has",
                    {"url": url},
                ) from error
            except ImageError as error:
                raise ImageError(
                    f"{error.message}\nAnother mirror of Alpine can be named by {MIRROR_VARIABLE}",
                    error.details,
                ) from error
        return path


def _check_index(file: Path, keys: Mapping[str, RSAPublicKey], url: str) -> None:
    apk.read_index(file.read_bytes(), keys, url)
