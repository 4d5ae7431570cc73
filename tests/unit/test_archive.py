"""The file that holds an image for other machines: whole and true, or refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_smolvm import ImageError
from pytest_smolvm.images import archive
from pytest_smolvm.images.cache import ImageFacts

KERNEL = b"a kernel" * 9


@pytest.fixture
def written(tmp_path: Path) -> bytes:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(KERNEL)
    contents = archive.Contents(
        format=archive.FORMAT,
        image=f"small-{'0' * 16}",
        facts=ImageFacts(name="small", architecture="x86_64", created_at=0),
        files={"image/vmlinux": archive.describe(kernel)},
    )
    path = tmp_path / "archive"
    archive.write(path, contents, {"image/vmlinux": kernel})
    return path.read_bytes()


def read(data: bytes, tmp_path: Path) -> tuple[archive.Contents, bytes]:
    path, scratch = tmp_path / "copy", tmp_path / "scratch"
    path.write_bytes(data)
    scratch.mkdir()
    try:
        contents = archive.read(path, scratch)
        return contents, (scratch / "image/vmlinux").read_bytes()
    finally:
        shutil.rmtree(scratch)


def spoilt(data: bytes) -> Iterator[tuple[str, bytes]]:
    for position in range(len(data)):
        yield f"cut off at {position}", data[:position]
        for mask in (0x01, 0x80, 0xFF):
            flipped = bytes([data[position] ^ mask])
            yield f"byte {position} ^ {mask}", data[:position] + flipped + data[position + 1 :]
    yield "one more byte", data + b"\0"
    yield "an empty frame more", data + bytes.fromhex("28b52ffd2000010000")
    yield "itself twice", data + data


def test_what_was_written_is_read(written: bytes, tmp_path: Path) -> None:
    assert read(written, tmp_path)[1] == KERNEL


def test_whatever_byte_is_wrong_or_missing_is_noticed(written: bytes, tmp_path: Path) -> None:
    """But for the few bits of a zstd frame that mean nothing: then all is as it was."""
    as_it_was = read(written, tmp_path)
    passed, unseen = [], []
    for what, data in spoilt(written):
        try:
            found = read(data, tmp_path)
        except ImageError:
            continue
        (passed if found == as_it_was else unseen).append(what)
    assert unseen == []
    assert len(passed) < 20
    assert all("byte" in what for what in passed)
