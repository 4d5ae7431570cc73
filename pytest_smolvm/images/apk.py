"""Alpine's package files and indexes, format 2: apk-package(5), apk-v2(5), apk-repositories(5).

Both are gzip members one after the other. An index begins with one that holds a signature of all
that follows. Of a package the first holds a signature, the second what is known of it (PKGINFO),
the rest its files. The index has a digest of a package's second member, and that has one of the
rest; so whoever trusts the index need not look at the package's own signature.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from pytest_smolvm.errors import ImageError
from pytest_smolvm.images import rootfs

_SIGNATURE = re.compile(r"\.SIGN\.(RSA|RSA256|RSA512)\.(?P<key>[^/]+)")
_HASHES: Mapping[str, type[hashes.HashAlgorithm]] = {
    "RSA": hashes.SHA1,  # what abuild signs with by default, to this day
    "RSA256": hashes.SHA256,
    "RSA512": hashes.SHA512,
}
_DIGESTS = {"Q1": "sha1", "Q2": "sha256"}
_MOST_OF_A_HEAD = 4 << 20  # bytes of what is unpacked before it is known to be true


@dataclass(frozen=True)
class IndexedPackage:
    """A package as an index tells of it."""

    name: str
    version: str
    checksum: str
    """Of its second member: Q1 and the SHA-1, or Q2 and the SHA-256, in base64."""
    size_bytes: int
    depends: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    priority: int = 0
    """Which of several that provide the same is to be taken: the highest."""

    @property
    def file_name(self) -> str:
        """What the mirror calls it."""
        return f"{self.name}-{self.version}.apk"


def read_keys(folder: Path) -> dict[str, RSAPublicKey]:
    """The public keys in a folder (PEM), by the file's name. ``ImageError``."""
    found: dict[str, RSAPublicKey] = {}
    try:
        for path in sorted(folder.glob("*.pub")):
            key = load_pem_public_key(path.read_bytes())
            if not isinstance(key, RSAPublicKey):
                raise ImageError(f"{path} is no RSA key, which apk's signatures are made with")
            found[path.name] = key
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ImageError(f"{folder} holds a key that cannot be read: {error}") from error
    if not found:
        raise ImageError(f"{folder} holds no keys (*.pub): mirrors are trusted by none")
    return found


def read_index(data: bytes, keys: Mapping[str, RSAPublicKey], origin: str) -> list[IndexedPackage]:
    """The packages of an index (``APKINDEX.tar.gz``) that one of ``keys`` has signed."""
    text = _file_of(_verified(data, keys, origin), "APKINDEX", origin).decode()
    return [_indexed(paragraph, origin) for paragraph in text.split("\n\n") if paragraph.strip()]


def check_package(path: Path, package: IndexedPackage) -> None:
    """``ImageError`` unless the file is the package that the index told of."""
    data = path.read_bytes()
    _, control, files = _members(data, path.name)
    kind, digest = package.checksum[:2], package.checksum[2:]
    try:
        wanted = base64.b64decode(digest, validate=True)
    except binascii.Error as error:
        raise _damaged(path.name, f"the index has no digest of it: {digest}") from error
    if kind not in _DIGESTS or hashlib.new(_DIGESTS[kind], control).digest() != wanted:
        raise _damaged(path.name, "it is not what the signed index says")
    info = _file_of(control, ".PKGINFO", path.name).decode()
    said = re.search(r"^datahash = ([0-9a-f]{64})$", info, re.MULTILINE)
    if said is None or hashlib.sha256(files).hexdigest() != said[1]:
        raise _damaged(path.name, "its files have another SHA-256 than it says")


def unpack_package(path: Path, tree: Path) -> None:
    """Unpack a package's files into ``tree``, as an ordinary user can; no scripts are run."""
    _, _, files = _members(path.read_bytes(), path.name)
    with (
        gzip.GzipFile(fileobj=io.BytesIO(files)) as plain,
        tarfile.open(fileobj=plain, mode="r|") as tar,
    ):
        rootfs.unpack_members(tar, tree, path)


def resolve(
    packages: Iterable[IndexedPackage], wanted: Iterable[str], origin: str
) -> list[IndexedPackage]:
    """``wanted`` with all that they depend on. ``ImageError`` if something is not there.

    Versions are not compared: a release's repository has one of each, which fit together.
    """
    by_name: dict[str, IndexedPackage] = {}
    providers: dict[str, list[IndexedPackage]] = {}
    for package in packages:
        by_name[package.name] = package
        for what in package.provides:
            providers.setdefault(_bare(what), []).append(package)
    found: dict[str, IndexedPackage] = {}
    todo = [(name, "this library") for name in wanted]
    while todo:
        name, for_whom = todo.pop()
        if name in found or any(p.name in found for p in providers.get(name, ())):
            continue
        choices = [by_name[name]] if name in by_name else providers.get(name, [])
        if not choices:
            raise ImageError(f"{origin} has no {name}, which {for_whom} needs", {"package": name})
        chosen = min(choices, key=lambda package: (-package.priority, package.name))
        found[chosen.name] = chosen
        todo += [(_bare(d), chosen.name) for d in chosen.depends if not d.startswith("!")]
    return sorted(found.values(), key=lambda package: package.name)


def _bare(dependency: str) -> str:
    """Without the version that is asked for."""
    return re.split(r"[<>=~]", dependency, maxsplit=1)[0]


def _indexed(paragraph: str, origin: str) -> IndexedPackage:
    fields = dict(line.split(":", 1) for line in paragraph.splitlines() if line[1:2] == ":")
    try:
        return IndexedPackage(
            name=_harmless(fields["P"]),
            version=_harmless(fields["V"]),
            checksum=fields["C"],
            size_bytes=int(fields["S"]),
            depends=tuple(fields.get("D", "").split()),
            provides=tuple(fields.get("p", "").split()),
            priority=int(fields.get("k", "0")),
        )
    except (KeyError, ValueError) as error:
        raise _damaged(origin, f"it has an entry that cannot be read: {paragraph!r}") from error


def _harmless(name: str) -> str:
    """A name that can be a file's."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+-]*", name):
        raise ValueError(name)
    return name


def _verified(data: bytes, keys: Mapping[str, RSAPublicKey], origin: str) -> bytes:
    """What follows a signature, if one of ``keys`` has made it."""
    head, rest = _split(data, origin)
    signers = []
    for member, signature in _files(head, origin):
        said = _SIGNATURE.fullmatch(member.name)
        if said is None:
            continue
        signers.append(said["key"])
        key = keys.get(said["key"])
        if key is not None:
            try:
                key.verify(signature, rest, PKCS1v15(), _HASHES[said[1]]())
            except InvalidSignature:
                raise _damaged(origin, f"the signature of {said['key']} is wrong") from None
            return rest
    by = ", ".join(signers) or "nobody"
    raise ImageError(
        f"{origin} is not to be trusted: it is signed by {by}, and trusted are "
        f"{', '.join(sorted(keys))}. For a mirror that signs with a key of its own, set "
        "SMOLVM_ALPINE_KEYS to a directory with that key",
        {"signed_by": signers, "trusted": sorted(keys)},
    )


def _members(data: bytes, origin: str) -> tuple[bytes, bytes, bytes]:
    """Signature, description and files of a package, each as it lies there."""
    signature, rest = _split(data, origin)
    control, files = _split(rest, origin)
    return signature, control, files


def _split(data: bytes, origin: str) -> tuple[bytes, bytes]:
    """The first gzip member, and what follows it; a large one is refused."""
    reader = zlib.decompressobj(wbits=31)
    try:
        reader.decompress(data, _MOST_OF_A_HEAD)
    except zlib.error as error:
        raise _damaged(origin, str(error)) from error
    if not reader.eof:
        raise _damaged(origin, "it ends, or goes on, where its signature should end")
    end = len(data) - len(reader.unused_data)
    return data[:end], data[end:]


def _file_of(member: bytes, name: str, origin: str) -> bytes:
    for found, content in _files(member, origin):
        if found.name == name:
            return content
    raise _damaged(origin, f"it has no {name}")


def _files(member: bytes, origin: str) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    try:
        with tarfile.open(fileobj=io.BytesIO(member), mode="r:gz") as tar:
            for found in tar:
                content = tar.extractfile(found)
                if content is not None:
                    yield found, content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise _damaged(origin, str(error)) from error


def _damaged(origin: str, why: str) -> ImageError:
    return ImageError(f"{origin} is damaged, or not from Alpine: {why}", {"file": origin})
