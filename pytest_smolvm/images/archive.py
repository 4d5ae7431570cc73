"""One file that holds an image for other machines: zstd-compressed tar, with a hash of each file.

::

    manifest.json                  Contents; the first, so that it is known what is to come
    image/<file>                   what lies in the image's directory
    templates/<key>/<file>         guests of it that have booted
    key                            the private key that its guests let in, if that is the library's

Nothing of it is taken for true before all of it is there and has the hash that was said. The
manifest and the tar's own headers are covered by the zstd frame's checksum.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pytest_smolvm.disks import data_extents
from pytest_smolvm.errors import ImageError
from pytest_smolvm.images.cache import ImageFacts, check_space

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

FORMAT = 1
MAGIC = b"\x28\xb5\x2f\xfd"  # of a zstd frame: RFC 8878
_MANIFEST = "manifest.json"
_MANIFEST_MAX = 16 << 20
_BLOCK = 1 << 20
_PIECE = 4096  # of compressed data: 128 MiB of plain data at the worst
_ZEROS = bytes(_BLOCK)
_NAME = re.compile(
    r"key|image/[A-Za-z0-9_][A-Za-z0-9._-]*|templates/[0-9a-f]{32}/[A-Za-z0-9_][A-Za-z0-9._-]*"
)


class FileInside(BaseModel):
    """What a file in the archive must be."""

    model_config = ConfigDict(frozen=True)

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    data_bytes: int = Field(ge=0)
    """What it takes of the disk, without its holes."""


class Contents(BaseModel):
    """What an archive says of itself."""

    model_config = ConfigDict(frozen=True)

    format: int
    image: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*-[0-9a-f]{16}$")
    """The name of the image's directory."""
    facts: ImageFacts
    public_key: str = ""
    """The public half of ``key``; empty: there is none."""
    templates: dict[str, dict[str, Any]] = {}
    """What is known of each template, by its key."""
    files: dict[str, FileInside]

    @field_validator("files")
    @classmethod
    def _check_names(cls, files: dict[str, FileInside]) -> dict[str, FileInside]:
        for name in files:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name for a file in it")
        return files


def describe(path: Path, known_sha256: str | None = None) -> FileInside:
    """What a file is, for the archive; its hash is worked out unless it is known."""
    with path.open("rb") as file:
        digest = known_sha256 or hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        data = sum(end - start for start, end in data_extents(file.fileno(), size))
    return FileInside(size=size, sha256=digest, data_bytes=data)


def write(target: Path, contents: Contents, sources: Mapping[str, Path]) -> None:
    """Write the archive. Raises ``OSError``."""
    compressor = zstandard.ZstdCompressor(level=3, threads=-1, write_checksum=True)
    with (
        target.open("wb") as file,
        compressor.stream_writer(file, closefd=False) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        text = contents.model_dump_json(indent=1).encode()
        tar.addfile(_member(_MANIFEST, len(text)), io.BytesIO(text))
        for name, facts in contents.files.items():
            with sources[name].open("rb") as source:
                tar.addfile(_member(name, facts.size), source)


def read(archive: Path, scratch: Path) -> Contents:
    """Unpack an archive into the empty directory ``scratch``; whole and true, or ``ImageError``."""
    try:
        with archive.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise _no_archive(archive)
        with (
            archive.open("rb") as file,
            io.BufferedReader(_Frame(file), _BLOCK) as stream,
            tarfile.open(fileobj=stream, mode="r|") as tar,
        ):
            contents = _read_contents(tar, archive)
            wanted = sum(facts.data_bytes for facts in contents.files.values())
            check_space(scratch, wanted, f"unpacking {archive}")
            _unpack(tar, contents, scratch, archive)
            while stream.read(_BLOCK):  # to its end, where the checksum is
                pass
    except (tarfile.TarError, zstandard.ZstdError, EOFError) as error:
        raise _damaged(archive, str(error)) from error
    except OSError as error:
        raise ImageError(
            f"{archive} cannot be unpacked in {scratch.parent}: {error.strerror or error}"
        ) from error
    return contents


def is_archive(path: Path) -> bool:
    """Whether a file is an archive of an image, whole or not."""
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                return False
            file.seek(0)
            with zstandard.ZstdDecompressor().stream_reader(file) as plain:
                return plain.read(512).startswith(_MANIFEST.encode() + b"\0")
    except (OSError, zstandard.ZstdError):
        return False


def _read_contents(tar: tarfile.TarFile, archive: Path) -> Contents:
    first = tar.next()
    data = tar.extractfile(first) if first and first.name == _MANIFEST else None
    if first is None or data is None or first.size > _MANIFEST_MAX:
        raise _no_archive(archive)
    text = data.read()
    found = re.search(rb'"format":\s*(\d+)', text)
    if found and int(found[1]) != FORMAT:
        raise ImageError(
            f"{archive} is in format {int(found[1])}, and this release of pytest-smolvm reads "
            f"{FORMAT}: export the image with the same release"
        )
    try:
        return Contents.model_validate_json(text)
    except ValidationError as error:
        raise _damaged(archive, f"its manifest cannot be read: {error}") from error


def _unpack(tar: tarfile.TarFile, contents: Contents, scratch: Path, archive: Path) -> None:
    missing = dict(contents.files)
    while (member := tar.next()) is not None:
        facts = missing.pop(member.name, None)
        data = tar.extractfile(member) if member.isreg() else None
        if facts is None or data is None or member.size != facts.size:
            raise _damaged(archive, f"its manifest does not tell of {member.name!r} as it is there")
        target = scratch / member.name
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _copy(data, target, facts.size) != facts.sha256:
            raise _damaged(archive, f"{member.name} has another SHA-256 than its manifest says")
    if missing:
        raise _damaged(archive, f"it lacks {', '.join(sorted(missing))}")


def _copy(data: IO[bytes], target: Path, size: int) -> str:
    """Copy, leaving holes for zeros; return the SHA-256."""
    digest = hashlib.sha256()
    with target.open("xb") as file:
        target.chmod(0o600)
        while block := data.read(_BLOCK):
            digest.update(block)
            if block == _ZEROS[: len(block)]:
                file.seek(len(block), io.SEEK_CUR)
            else:
                file.write(block)
        file.truncate(size)
    return digest.hexdigest()


class _Frame(io.RawIOBase):
    """What is in a zstd frame: exactly one, and all of it, or ``EOFError``.

    ``zstandard``'s own readers take the end of the file for the end of the frame, and so would
    not miss a checksum that was cut off.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while not self._plain:
            piece = self._file.read(_PIECE)
            if self._frame.eof:
                if piece or self._frame.unused_data:
                    raise EOFError("there is more in it than there should be")
                return 0
            if not piece:
                raise EOFError("it ends too early")
            self._plain = memoryview(self._frame.decompress(piece))
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._plain))
        target[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    return member


def _no_archive(path: Path) -> ImageError:
    return ImageError(
        f"{path} is no archive of an image: give what pytest-smolvm image export wrote",
        {"path": str(path)},
    )


def _damaged(archive: Path, why: str) -> ImageError:
    return ImageError(
        f"{archive} is damaged: {why}; nothing of it was used", {"path": str(archive)}
    )
