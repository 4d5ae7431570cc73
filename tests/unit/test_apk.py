"""Alpine's package files and indexes, and downloads: what is believed, and what is not."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from pytest_smolvm import ImageError
from pytest_smolvm.images import apk
from pytest_smolvm.images.alpine import AlpinePackages, keys_folder
from pytest_smolvm.images.apk import IndexedPackage
from pytest_smolvm.images.cache import StalePackagesError
from pytest_smolvm.images.download import NotThereError, download
from pytest_smolvm.images.toolbox import Toolbox
from pytest_smolvm.limits import ARCHITECTURES
from tests import alpine
from tests.alpine import ARCH, KEY_NAME, REPOSITORY, Apk, Server, Signer


def keys_of(signer: Signer) -> dict[str, object]:
    return {KEY_NAME: load_pem_public_key(signer.public)}


def some_packages() -> list[Apk]:
    library = Apk("lib", "1-r0", provides=["so:lib.so.1=1"])
    library.add("usr/", mode=0o755)
    library.add("usr/lib.so.1", b"library")
    tool = Apk("tool", "2.0-r1", depends=["so:lib.so.1", "lib>=1", "!other", "/bin/sh"])
    tool.add("usr/bin/tool", b"#!/bin/sh\n", 0o755)
    tool.add("usr/bin/link", link="tool")
    shells = [
        Apk("ash", "1-r0", provides=["/bin/sh"], priority="1"),
        Apk("zsh", "1-r0", provides=["/bin/sh"], priority="9", depends=["tool"]),
    ]
    return [library, tool, *shells]


@pytest.fixture(params=["RSA", "RSA256"])
def signer(request: pytest.FixtureRequest) -> Signer:
    return Signer(request.param)


@pytest.fixture
def repository(tmp_path: Path, signer: Signer) -> Path:
    folder = tmp_path / "mirror" / REPOSITORY
    alpine.write_repository(folder, some_packages(), signer)
    return folder


@pytest.fixture
def server(repository: Path, tmp_path: Path) -> Iterator[Server]:
    with alpine.serving(tmp_path / "mirror") as found:
        yield found


@pytest.fixture
def packages(
    server: Server, signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AlpinePackages:
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / KEY_NAME).write_bytes(signer.public)
    monkeypatch.setenv("SMOLVM_ALPINE_KEYS", str(keys))
    return AlpinePackages(tmp_path / "cache", server.url, "3.23", ARCH, lambda _: None)


def test_what_a_trusted_key_has_signed_is_read(repository: Path, signer: Signer) -> None:
    index = (repository / "APKINDEX.tar.gz").read_bytes()
    found = {package.name: package for package in apk.read_index(index, keys_of(signer), "it")}
    assert sorted(found) == ["ash", "lib", "tool", "zsh"]
    assert found["tool"].version == "2.0-r1"
    assert found["tool"].file_name == "tool-2.0-r1.apk"
    assert found["zsh"].priority == 9
    assert found["lib"].provides == ("so:lib.so.1=1",)
    for package in found.values():
        assert (repository / package.file_name).stat().st_size == package.size_bytes


def test_what_another_key_has_signed_is_not(repository: Path, signer: Signer) -> None:
    index = (repository / "APKINDEX.tar.gz").read_bytes()
    with pytest.raises(ImageError, match=f"the signature of {KEY_NAME} is wrong"):
        apk.read_index(index, keys_of(Signer()), "it")
    stranger = {"other.rsa.pub": load_pem_public_key(signer.public)}
    with pytest.raises(ImageError, match=f"signed by {KEY_NAME}, and trusted are other.rsa.pub"):
        apk.read_index(index, stranger, "it")


def test_an_index_without_a_signature_is_not_read(repository: Path, signer: Signer) -> None:
    index = (repository / "APKINDEX.tar.gz").read_bytes()
    _, unsigned = apk._split(index, "it")
    with pytest.raises(ImageError, match="it is signed by nobody"):
        apk.read_index(unsigned, keys_of(signer), "it")
    # What was put before the signature, or after the end, was not signed.
    for changed in (unsigned + index, index + unsigned, index[:-9], index[:200], b"", b"\0" * 99):
        with pytest.raises(ImageError, match=r"is wrong|signed by nobody|is damaged"):
            apk.read_index(changed, keys_of(signer), "it")


def test_what_is_not_signed_yet_does_not_fill_the_memory(signer: Signer) -> None:
    bomb = gzip.compress(bytes(1 << 26), compresslevel=1)
    with pytest.raises(ImageError, match="where its signature should end"):
        apk.read_index(bomb, keys_of(signer), "it")


@pytest.mark.parametrize("part", ["description", "files"])
def test_a_package_that_is_not_the_indexed_one_is_found_out(
    repository: Path, signer: Signer, part: str
) -> None:
    index = (repository / "APKINDEX.tar.gz").read_bytes()
    (tool,) = (p for p in apk.read_index(index, keys_of(signer), "it") if p.name == "tool")
    path = repository / tool.file_name
    apk.check_package(path, tool)
    whole = bytearray(path.read_bytes())
    signature, control, _ = apk._members(bytes(whole), "it")
    start = len(signature) + (0 if part == "description" else len(control))
    whole[start + 40] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ImageError, match="is damaged, or not from Alpine"):
        apk.check_package(path, tool)


def test_dependencies_are_found_by_what_packages_provide() -> None:
    known = [
        IndexedPackage("a", "1", "", 0, ("so:b.so.1", "c>=2", "!x", "/bin/sh")),
        IndexedPackage("b", "1", "", 0, ("a",), ("so:b.so.1=1.2",)),
        IndexedPackage("c", "2", "", 0),
        IndexedPackage("low", "1", "", 0, (), ("/bin/sh",), 10),
        IndexedPackage("high", "1", "", 0, (), ("/bin/sh",), 100),
        IndexedPackage("x", "1", "", 0),
    ]
    names = [package.name for package in apk.resolve(known, ["a"], "the mirror")]
    assert names == ["a", "b", "c", "high"]
    # Whoever is there already is good enough.
    names = [package.name for package in apk.resolve(known, ["a", "low"], "the mirror")]
    assert names == ["a", "b", "c", "low"]
    with pytest.raises(ImageError, match="the mirror has no so:none, which d needs"):
        apk.resolve([IndexedPackage("d", "1", "", 0, ("so:none",))], ["d"], "the mirror")


def test_packages_are_downloaded_checked_and_unpacked(
    packages: AlpinePackages, server: Server, tmp_path: Path
) -> None:
    found = packages.resolve(["tool"], ["ash"])
    assert [package.name for package in found] == ["lib", "tool", "zsh", "ash"]
    for path in packages.download(found):
        packages.unpack(path, tmp_path / "tree")
    assert (tmp_path / "tree/usr/lib.so.1").read_bytes() == b"library"
    assert (tmp_path / "tree/usr/bin/tool").stat().st_mode & 0o111
    assert (tmp_path / "tree/usr/bin/link").readlink() == Path("tool")
    asked = len(server.requests)
    assert asked == 5
    assert packages.download(packages.resolve(["tool"], ["ash"]))
    assert len(server.requests) == asked, "all of it is there"


def test_a_damaged_package_in_the_cache_is_fetched_anew(
    packages: AlpinePackages, server: Server
) -> None:
    (path,) = packages.download(packages.resolve([], ["lib"]))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert packages.download(packages.resolve([], ["lib"])) == [path]
    assert path.read_bytes() == whole


def test_a_renewed_mirror_is_noticed(
    packages: AlpinePackages, repository: Path, signer: Signer
) -> None:
    found = packages.resolve([], ["lib"])
    (repository / found[0].file_name).unlink()
    with pytest.raises(StalePackagesError, match=r"lib-1-r0\.apk, of which its index told"):
        packages.download(found)
    newer = Apk("lib", "2-r0")
    newer.add("file", b"newer")
    alpine.write_repository(repository, [newer], signer)
    packages.refresh()
    assert packages.download(packages.resolve([], ["lib"]))[0].name == "lib-2-r0.apk"


def test_an_index_that_cannot_be_had_anew_stays(
    packages: AlpinePackages, repository: Path, server: Server
) -> None:
    found = packages.resolve(["tool"])
    (repository / "APKINDEX.tar.gz").write_bytes(b"no index")
    with pytest.raises(ImageError, match="is damaged"):
        packages.refresh()
    assert packages.resolve(["tool"]) == found


def ignore(path: Path) -> None:
    """A check that finds nothing wrong."""


def test_a_download_goes_on_where_it_broke_off(server: Server, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4000
    (server.folder / "file").write_bytes(data)
    server.cut_after["file"] = 300_000
    target = tmp_path / "file"
    download(f"{server.url}/file", target, ignore)
    assert target.read_bytes() == data
    assert server.requests == [("file", 0), ("file", 300_000)]
    assert sorted(path.name for path in tmp_path.iterdir() if "part" in path.name) == []
    download(f"{server.url}/file", target, ignore)
    assert len(server.requests) == 2, "what is there is not asked for"


def test_what_a_killed_download_left_is_used_or_done_anew(server: Server, tmp_path: Path) -> None:
    (server.folder / "file").write_bytes(b"0123456789")
    target = tmp_path / "file"
    (tmp_path / ".file.part").write_bytes(b"0123")
    download(f"{server.url}/file", target, ignore)
    assert (target.read_bytes(), server.requests) == (b"0123456789", [("file", 4)])
    target.unlink()
    server.requests.clear()

    def check(path: Path) -> None:
        if path.read_bytes() != b"0123456789":
            raise ImageError("wrong")

    # Of another file; and more than there is.
    for left in (b"abcd", b"abcdefghijklmnop"):
        (tmp_path / ".file.part").write_bytes(left)
        download(f"{server.url}/file", target, check)
        assert target.read_bytes() == b"0123456789"
        target.unlink()


def test_what_is_wrong_is_not_kept(server: Server, tmp_path: Path) -> None:
    (server.folder / "file").write_bytes(b"bad")

    def check(path: Path) -> None:
        raise ImageError("this is wrong")

    with pytest.raises(ImageError, match="this is wrong"):
        download(f"{server.url}/file", tmp_path / "file", check)
    assert server.requests == [("file", 0)]
    assert not list(tmp_path.glob("*file*part")) + list(tmp_path.glob("file"))


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_what_is_not_there_is_said(server: Server, tmp_path: Path, scheme: str) -> None:
    url = f"{server.url}/nothing" if scheme == "http" else f"file://{tmp_path}/nothing"
    with pytest.raises(NotThereError, match=f"there is no {url}"):
        download(url, tmp_path / "file", ignore)


def test_without_a_network_the_way_on_is_said(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"could not be downloaded: .*Is the network up\?"):
        download("http://127.0.0.1:1/file", tmp_path / "file", ignore)


def test_a_full_disk_is_said(server: Server, tmp_path: Path) -> None:
    (server.folder / "file").write_bytes(b"data")
    (tmp_path / ".file.part").symlink_to("/dev/full")
    with pytest.raises(ImageError, match=f"the disk with {tmp_path} is full"):
        download(f"{server.url}/file", tmp_path / "file", ignore)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_alpines_own_keys_are_part_of_the_library(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SMOLVM_ALPINE_KEYS", raising=False)
    keys = apk.read_keys(keys_folder(architecture))
    assert all(name.startswith("alpine-devel@lists.alpinelinux.org-") for name in keys)
    assert all(key.key_size >= 4096 for key in keys.values())


def test_a_folder_without_keys_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"holds no keys \(\*\.pub\)"):
        apk.read_keys(tmp_path)
    (tmp_path / "a.pub").write_text("no key")
    with pytest.raises(ImageError, match="holds a key that cannot be read"):
        apk.read_keys(tmp_path)


@pytest.mark.parametrize(
    ("linker", "can"), [("/lib/ld-musl-x86_64.so.1", False), ("/lib64/ld-linux-x86-64.so.2", True)]
)
def test_guests_with_musls_ssh_server_are_not_restored(
    tmp_path: Path, linker: str, can: bool
) -> None:
    server = bytearray(256)
    server[:4] = b"\x7fELF"
    struct.pack_into("<Q", server, 32, 64)
    struct.pack_into("<HH", server, 54, 56, 1)
    struct.pack_into("<IIQQQQ", server, 64, 3, 0, 128, 0, 0, len(linker) + 1)
    server[128 : 128 + len(linker)] = linker.encode()
    for path, data in (("usr/sbin/dropbear", server), (linker.lstrip("/"), b"linker")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    assert Toolbox(tmp_path, tmp_path, {}).can_restore() is can
