"""Root file systems: what becomes of tar archives, directories and disks, without a guest."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from pytest_smolvm.errors import ImageError
from pytest_smolvm.images import ext4, rootfs
from pytest_smolvm.images.ext4 import Inode
from pytest_smolvm.process import find_tool


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=kind, linkname=target)


def stats(image: Path, path: str) -> str:
    return subprocess.run(
        ["/sbin/debugfs", "-R", f"stat {ext4.quote(path)}", image],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def check_is_sound(image: Path) -> None:
    done = subprocess.run(["/sbin/e2fsck", "-fn", image], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


def make(source: Path, tmp_path: Path, size_mb: int | None = 64) -> Path:
    image, work = tmp_path / "made.ext4", tmp_path / "work"
    work.mkdir(exist_ok=True)
    image.unlink(missing_ok=True)
    rootfs.make_image(source, image, work, size_mb, lambda _: None)
    check_is_sound(image)
    return image


def test_a_tar_archive_keeps_what_no_ordinary_user_could_write(tmp_path: Path) -> None:
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    info, data = member("usr/bin/ping", b"ping", mode=0o755)
    info.pax_headers = {"SCHILY.xattr.security.capability": capability.decode("latin-1")}
    archive = write_tar(
        tmp_path / "root.tar",
        member("usr", type=tarfile.DIRTYPE, mode=0o755),
        member("usr/bin", type=tarfile.DIRTYPE, mode=0o555),
        (info, data),
        member("usr/bin/su", b"su", mode=0o4755),
        member("etc/shadow", b"root:*", mode=0, gid=42),
        member("home/me", type=tarfile.DIRTYPE, uid=70000, gid=70001, mode=0o2770),
        member("tmp", type=tarfile.DIRTYPE, mode=0o1777),
        link("bin", "usr/bin"),
        link("usr/bin/su2", "usr/bin/su", tarfile.LNKTYPE),
        member('we "ird', b"x"),
        member("opt/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
        member("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
        member("run/pipe", type=tarfile.FIFOTYPE, mode=0o600),
    )
    image = make(archive, tmp_path)
    assert "Mode:  04755" in stats(image, "/usr/bin/su")
    assert "Links: 2" in stats(image, "/usr/bin/su")
    assert "Mode:  0555" in stats(image, "/usr/bin")
    shadow = stats(image, "/etc/shadow")
    assert "Mode:  0000" in shadow
    assert "Group:    42" in shadow
    home = stats(image, "/home/me")
    assert "User: 70000   Group: 70001" in home
    assert "Mode:  02770" in home
    assert "Mode:  01777" in stats(image, "/tmp")
    assert 'Fast link dest: "usr/bin"' in stats(image, "/bin")
    assert "Type: character special" in stats(image, "/opt/null")
    assert "Type: FIFO" in stats(image, "/run/pipe")
    assert not ext4.has_file(image, "/dev/null"), "the guest's kernel makes these"
    assert ext4.has_file(image, '/we "ird')
    assert ext4.read_file(image, "/usr/bin/ping") == b"ping"


def gzip(path: Path) -> Path:
    return write_tar(path, member("etc/passwd", b"root"), mode="w:gz")


def xz(path: Path) -> Path:
    return write_tar(path, member("etc/passwd", b"root"), mode="w:xz")


def zstd(path: Path) -> Path:
    plain = write_tar(path, member("etc/passwd", b"root"))
    plain.write_bytes(zstandard.compress(plain.read_bytes()))
    return plain


@pytest.mark.parametrize("compress", [gzip, xz, zstd])
def test_a_tar_archive_may_be_compressed(tmp_path: Path, compress: Callable[[Path], Path]) -> None:
    # What it is called does not matter.
    assert ext4.read_file(make(compress(tmp_path / "root"), tmp_path), "/etc/passwd") == b"root"


@pytest.mark.parametrize(
    "members",
    [
        [member("../evil", b"x")],
        [member("a/../../evil", b"x")],
        [link("out", "/"), member("out/tmp/smolvm-evil", b"x")],
        [link("out", ".."), member("out/evil", b"x")],
        [link("mine", "../../etc/passwd", tarfile.LNKTYPE)],
        [link("out", "/etc"), link("mine", "out/passwd", tarfile.LNKTYPE)],
    ],
)
def test_an_archive_that_leads_out_of_itself_is_refused(
    tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    tree = tmp_path / "in" / "tree"
    tree.parent.mkdir()
    with pytest.raises(ImageError, match="leads out of it"):
        rootfs.unpack_tar(write_tar(tmp_path / "root.tar", *members), tree)
    assert not (tmp_path / "evil").exists()
    assert not (tree.parent / "evil").exists()


def test_absolute_names_lie_in_the_tree(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "root.tar", member("/etc/motd", b"hello"))
    rootfs.unpack_tar(archive, tmp_path / "tree")
    assert (tmp_path / "tree/etc/motd").read_bytes() == b"hello"


def test_a_hard_link_to_a_symbolic_link_is_one(tmp_path: Path) -> None:
    archive = write_tar(
        tmp_path / "root.tar", link("a", "/etc/passwd"), link("b", "a", tarfile.LNKTYPE)
    )
    rootfs.unpack_tar(archive, tmp_path / "tree")
    assert (tmp_path / "tree/b").readlink() == Path("/etc/passwd")


def test_a_file_that_comes_twice_is_the_later_one(tmp_path: Path) -> None:
    archive = write_tar(
        tmp_path / "root.tar",
        link("a", "/etc/passwd"),
        member("a", b"mine", mode=0o640),
    )
    inodes = rootfs.unpack_tar(archive, tmp_path / "tree")
    assert (tmp_path / "tree/a").read_bytes() == b"mine"
    assert inodes["a"] == Inode(stat.S_IFREG | 0o640)


@pytest.mark.parametrize("name", ["manifest.json", "oci-layout"])
def test_layers_of_a_container_image_are_told_from_a_tree(tmp_path: Path, name: str) -> None:
    archive = write_tar(tmp_path / "saved.tar", member("0123/layer.tar", b"x"), member(name, b"[]"))
    with pytest.raises(ImageError, match="docker export CONTAINER"):
        make(archive, tmp_path)


@pytest.mark.parametrize("cut", [700, 1500])
def test_an_archive_that_ends_too_early_is_refused(tmp_path: Path, cut: int) -> None:
    archive = write_tar(tmp_path / "root.tar", member("a", b"x" * 5000))
    archive.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(ImageError, match=r"not a whole tar archive|neither a tar archive"):
        make(archive, tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, os.urandom(5000), b"#!/bin/sh\n"])
def test_what_is_no_root_file_system_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "something"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"something.* (neither a tar archive|is empty)"):
        make(path, tmp_path)


def test_a_directory_of_an_ordinary_users_is_roots(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/passwd").write_text("root")
    os.chown(tree / "etc/passwd", 1234, 1234) if os.geteuid() == 0 else None
    image = make(tree, tmp_path)
    owner = 1234 if os.geteuid() == 0 else 0
    assert f"User: {owner:5d}   Group: {owner:5d}" in stats(image, "/etc/passwd")
    assert "User:     0" in stats(image, "/etc")


def test_a_directory_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "secret").write_text("x")
    # Root, as whom these tests may run, may read all there is.
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path).name != "secret")
    with pytest.raises(ImageError, match="secret cannot be read"):
        make(tree, tmp_path)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    tree = tmp_path / "disk-tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/passwd").write_text("root of the disk")
    image = tmp_path / "disk.ext4"
    ext4.make_ext4(tree, image, 32)
    return image


def test_a_disk_stays_as_it_is_and_may_grow(tmp_path: Path, disk: Path) -> None:
    before = disk.read_bytes()
    image = make(disk, tmp_path, None)
    assert image.read_bytes() == before
    assert make(disk, tmp_path, 100).stat().st_size == 100 << 20
    with pytest.raises(ImageError, match="rootfs_size_mb=16 is less than the 32 MiB"):
        make(disk, tmp_path, 16)
    assert disk.read_bytes() == before


def test_a_qcow2_disk_is_unpacked(tmp_path: Path, disk: Path) -> None:
    packed = tmp_path / "disk.qcow2"
    subprocess.run(
        ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", disk, packed], check=True
    )
    assert make(packed, tmp_path, None).read_bytes() == disk.read_bytes()


def test_a_qcow2_over_another_file_is_refused(tmp_path: Path, disk: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "raw", overlay], check=True
    )
    with pytest.raises(ImageError, match="refers to another file"):
        make(overlay, tmp_path, None)


@pytest.mark.parametrize("table", ["gpt", "dos"])
def test_the_root_is_found_on_a_partitioned_disk(tmp_path: Path, disk: Path, table: str) -> None:
    sfdisk = find_tool("sfdisk", "fdisk")
    whole = tmp_path / "whole.raw"
    with whole.open("wb") as file:
        file.truncate(80 << 20)
    layout = f"label: {table}\nstart=2048, size=16384, type={'U' if table == 'gpt' else 'ef'}\n"
    layout += "start=20480, size=65536, type=L\n"
    subprocess.run([sfdisk, "-q", whole], input=layout, text=True, check=True)
    with whole.open("r+b") as file:
        file.seek(20480 * 512)
        file.write(disk.read_bytes())
    assert make(whole, tmp_path, None).read_bytes() == disk.read_bytes()


def test_a_command_that_debugfs_cannot_carry_out_is_an_error(disk: Path) -> None:
    with pytest.raises(ImageError, match="could not be changed"):
        ext4.edit(disk, ["rm /nothing/there"])
