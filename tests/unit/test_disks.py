"""Disks on the host: overlays that cost nothing, formats, fingerprints."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from pytest_smolvm import ImageError
from pytest_smolvm.disks import (
    Image,
    copy_sparsely,
    create_overlay,
    fingerprint,
    image_format,
    link_layer,
    reopen_overlay,
    shared_disk,
)
from pytest_smolvm.process import run_tool


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.write(b"\0" * 4096)
        file.truncate(size)
    return path


def test_an_overlay_costs_the_same_whatever_the_images_size(tmp_path: Path) -> None:
    written = []
    for size in (10 << 20, 10 << 30):
        overlay = tmp_path / f"{size}.qcow2"
        create_overlay(sparse(tmp_path / f"{size}.img", size), overlay)
        facts = overlay.stat()
        written.append(facts.st_blocks * 512)
        assert facts.st_size < 1 << 20
    assert max(written) < 1 << 20
    assert written[0] == written[1]


def test_an_overlay_is_a_disk_over_its_image(tmp_path: Path) -> None:
    base = sparse(tmp_path / "base.img", 1 << 20)
    overlay = tmp_path / "disk.qcow2"
    disk = create_overlay(base, overlay)
    assert disk.image.path == overlay
    assert disk.backing == (Image(base, "raw"),)
    assert not disk.read_only
    assert reopen_overlay(base, overlay) == disk


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, 10 << 30, 600 << 30, 5 << 40])
def test_an_overlay_is_what_qemu_img_makes(tmp_path: Path, size: int) -> None:
    base = sparse(tmp_path / "base.img", size)
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    create_overlay(base, ours)
    run_tool(
        [
            *("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw"),
            *("-b", str(base), str(theirs)),
        ],
        timeout_s=30,
    )
    run_tool(["qemu-img", "check", "-q", str(ours)], timeout_s=30)
    told = []
    for path in (ours, theirs):
        text = run_tool(["qemu-img", "info", "--output=json", str(path)], timeout_s=30)
        facts = json.loads(text)
        told.append({k: v for k, v in facts.items() if k not in ("filename", "actual-size")})
        told[-1].pop("children", None)  # newer releases: the files' own names and sizes
        options = facts["format-specific"]["data"]
        assert options["compat"] == "1.1"
    assert told[0] == told[1]
    # It takes data, and stays sound.
    run_tool(
        ["qemu-io", "-c", "write -P 7 4k 64k", "-c", "read -P 7 4k 64k", str(ours)], timeout_s=30
    )
    run_tool(["qemu-img", "check", "-q", str(ours)], timeout_s=30)


def test_layers_lie_between_a_disk_and_its_image(tmp_path: Path) -> None:
    base = sparse(tmp_path / "base.img", 1 << 20)
    made, used = tmp_path / "made", tmp_path / "used"
    made.mkdir()
    used.mkdir()
    create_overlay(base, made / "layer-1.qcow2")
    run_tool(["qemu-io", "-c", "write -P 7 0 64k", str(made / "layer-1.qcow2")], timeout_s=30)
    layer = link_layer(made / "layer-1.qcow2", used)
    disk = create_overlay(base, used / "disk.qcow2", [layer])
    assert disk.backing == (Image(layer, "qcow2"), Image(base, "raw"))
    # The layer outlives the place where it was made.
    shutil.rmtree(made)
    run_tool(["qemu-io", "-r", "-c", "read -P 7 0 64k", str(used / "disk.qcow2")], timeout_s=30)


def test_a_layer_on_another_file_system_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_arguments: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    layer = sparse(tmp_path / "layer", 1 << 20)
    (tmp_path / "used").mkdir()
    copy = link_layer(layer, tmp_path / "used")
    assert copy.read_bytes() == layer.read_bytes()


def test_a_copy_has_the_data_and_the_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.truncate(64 << 20)
        for at in (0, 10 << 20, (64 << 20) - 5):
            file.seek(at)
            file.write(b"data%d" % at if at < 60 << 20 else b"last!")
    copy_sparsely(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks <= source.stat().st_blocks < 1 << 10
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_shared_disk_is_the_image_itself_read_only(tmp_path: Path) -> None:
    base = sparse(tmp_path / "base.img", 1 << 20)
    disk = shared_disk(base)
    assert (disk.image.path, disk.backing, disk.read_only) == (base, (), True)


def test_formats_are_told_by_content_not_by_name(tmp_path: Path) -> None:
    raw = sparse(tmp_path / "disk.qcow2", 1 << 20)
    assert image_format(raw) == "raw"
    real = tmp_path / "disk.img"
    run_tool(["qemu-img", "create", "-q", "-f", "qcow2", str(real), "1M"], timeout_s=30)
    assert image_format(real) == "qcow2"


def test_a_qcow2_image_that_refers_to_another_file_is_refused(tmp_path: Path) -> None:
    overlay = tmp_path / "guest.qcow2"
    run_tool(
        [
            *("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw"),
            *("-b", "/etc/hostname", str(overlay)),
        ],
        timeout_s=30,
    )
    with pytest.raises(ImageError, match=r"refers to another file.*qemu-img convert"):
        image_format(overlay)


def test_a_qcow2_image_with_its_data_elsewhere_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    header = b"QFI\xfb" + struct.pack(">IQ", 3, 0)
    image.write_bytes(header.ljust(72, b"\0") + struct.pack(">Q", 4) + b"\0" * 24)
    with pytest.raises(ImageError, match="refers to another file"):
        image_format(image)


def test_empty_truncated_and_missing_images_are_errors_that_name_them(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(ImageError, match=r"empty is empty"):
        image_format(empty)
    short = tmp_path / "short"
    short.write_bytes(b"QFI\xfb\0\0\0\3")
    with pytest.raises(ImageError, match="ends within its header"):
        image_format(short)
    with pytest.raises(ImageError, match="missing cannot be read"):
        image_format(tmp_path / "missing")


def test_an_overlay_that_cannot_be_made_is_an_image_error(tmp_path: Path) -> None:
    base = sparse(tmp_path / "base.img", 1 << 20)
    with pytest.raises(ImageError, match=r"base\.img"):
        create_overlay(base, tmp_path / "no" / "such" / "folder.qcow2")


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"content")
    shutil.copy(first, second)
    cache = tmp_path / "cache"
    assert fingerprint(first, cache) == fingerprint(second, cache)
    assert len(fingerprint(first, cache)) == 64


def test_a_fingerprint_changes_with_the_content_though_size_and_time_stay(tmp_path: Path) -> None:
    image, cache = tmp_path / "image", tmp_path / "cache"
    image.write_bytes(b"one")
    before, times = fingerprint(image, cache), image.stat()
    image.write_bytes(b"two")
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(image, cache) != before


def test_a_file_is_hashed_again_only_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_smolvm import disks

    calls = []
    real = disks._hash
    monkeypatch.setattr(disks, "_hash", lambda path: calls.append(path) or real(path))
    image, cache = tmp_path / "image", tmp_path / "cache"
    image.write_bytes(b"one")
    assert fingerprint(image, cache) == fingerprint(image, cache)
    assert len(calls) == 1
    image.write_bytes(b"other")
    fingerprint(image, cache)
    assert len(calls) == 2
