"""Archives from a guest that cannot be trusted."""

from __future__ import annotations

import io
import stat
import tarfile
from pathlib import Path

import pytest

from pytest_smolvm import SmolVMError
from pytest_smolvm.transfer import unpack_tree


def archive(*members: tuple[str, dict[str, object], bytes]) -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, fields, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in fields.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data))
    buffer.seek(0)
    return buffer


def link(target: str) -> dict[str, object]:
    return {"type": tarfile.SYMTYPE, "linkname": target}


def test_files_folders_links_and_modes_are_kept(tmp_path: Path) -> None:
    unpack_tree(
        archive(
            ("./", {"type": tarfile.DIRTYPE, "mode": 0o755}, b""),
            ("./bin/", {"type": tarfile.DIRTYPE, "mode": 0o500}, b""),
            ("./bin/tool", {"mode": 0o755}, b"#!/bin/sh"),
            ("./secret", {"mode": 0o600}, b"s"),
            ("./link", link("bin/tool"), b""),
            ("./hard", {"type": tarfile.LNKTYPE, "linkname": "./secret", "mode": 0o600}, b""),
        ),
        tmp_path / "out",
    )
    out = tmp_path / "out"
    assert (out / "bin/tool").read_bytes() == b"#!/bin/sh"
    assert stat.S_IMODE((out / "bin/tool").stat().st_mode) == 0o755
    assert stat.S_IMODE((out / "bin").stat().st_mode) == 0o500
    assert stat.S_IMODE((out / "secret").stat().st_mode) == 0o600
    assert (out / "link").readlink() == Path("bin/tool")
    assert (out / "hard").read_bytes() == b"s"
    (out / "bin").chmod(0o700)


@pytest.mark.parametrize("name", ["../escape", "/tmp/escape", "a/../../escape"])
def test_names_that_lead_out_of_the_target_are_refused(tmp_path: Path, name: str) -> None:
    target = tmp_path / "out"
    with pytest.raises(SmolVMError, match="leads out of the target"):
        unpack_tree(archive((name, {}, b"x")), target)
    assert not (tmp_path / "escape").exists()
    assert not Path("/tmp/escape").exists()


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    unpack_tree(
        archive(
            ("folder", link(str(outside)), b""),
            ("folder/file", {}, b"theirs"),
            ("one", link(str(outside / "file")), b""),
            ("one", {}, b"theirs"),
            ("two", {"type": tarfile.LNKTYPE, "linkname": "one"}, b""),
        ),
        tmp_path / "out",
    )
    assert (outside / "file").read_text() == "mine"
    assert sorted(path.name for path in outside.iterdir()) == ["file"]


def test_links_that_lie_in_the_target_already_are_not_followed(tmp_path: Path) -> None:
    outside, target = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    target.mkdir()
    (target / "folder").symlink_to(outside)
    unpack_tree(archive(("folder/file", {}, b"theirs")), target)
    assert list(outside.iterdir()) == []
    assert (target / "folder/file").read_bytes() == b"theirs"


def test_devices_and_special_modes_stay_in_the_guest(tmp_path: Path) -> None:
    unpack_tree(
        archive(
            ("device", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}, b""),
            ("pipe", {"type": tarfile.FIFOTYPE}, b""),
            ("tool", {"mode": 0o6755}, b"x"),
        ),
        tmp_path,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["tool"]
    assert stat.S_IMODE((tmp_path / "tool").stat().st_mode) == 0o755


def test_names_with_newlines_and_escapes_are_only_names(tmp_path: Path) -> None:
    unpack_tree(archive(("a\nb\x1b[31m", {}, b"x")), tmp_path)
    assert (tmp_path / "a\nb\x1b[31m").read_bytes() == b"x"


def test_what_is_no_archive_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(SmolVMError, match="failed"):
        unpack_tree(io.BytesIO(b"not a tar archive" * 100), tmp_path / "out")
