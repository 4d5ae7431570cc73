"""Alpine from a mirror: true packages of a true Alpine, from a mirror that the tests make."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_smolvm import ImageBuilder, ImageError, SmolVM
from tests import alpine
from tests.alpine import BRANCH, REPOSITORY, Apk, Server, Signer
from tests.vm.test_distributions import config_of


@pytest.fixture
def builder(micro: tuple[Path, Path], tmp_path: Path) -> ImageBuilder:
    """One with an empty cache; Debian's packages are downloaded."""
    cache = tmp_path / "images"
    cache.mkdir()
    (cache / "debian").symlink_to(micro[0].parents[1] / "debian")
    return ImageBuilder(cache, progress=lambda _: None)


def test_an_alpine_is_installed_from_a_mirror(mirror: Server, builder: ImageBuilder) -> None:
    image = builder.build("alpine")
    with SmolVM(config_of(image)) as vm:
        assert vm.run(". /etc/os-release; echo $ID $VERSION_ID").output.startswith("alpine 3.23.")
        assert "libc.musl" in vm.run("ldd /bin/busybox").stdout
        assert vm.run("apk info -e alpine-release apk-tools openrc").ok
        # Every file is what its package says, and belongs to whom it says.
        audit = vm.run("apk audit --system --check-permissions").check()
        mounted_over = {"m sys/", "m proc/", "m dev/shm/"}
        assert set(audit.stdout.splitlines()) <= mounted_over
        assert vm.run("stat -c '%a %U:%G' /etc/shadow /tmp").stdout.splitlines() == [
            "640 root:shadow",
            "1777 root:root",
        ]
        assert vm.run("cat /etc/apk/repositories").stdout.splitlines() == [
            f"{mirror.url}/{BRANCH}/main",
            f"{mirror.url}/{BRANCH}/community",
        ]
        assert vm.run("modprobe dummy && cat /sys/module/dummy/initstate").output == "live"
        assert vm.run("rc-status --list").ok
        assert vm.run("test -s /etc/machine-id && hostname").output == vm.vm_id


def test_once_built_no_mirror_is_needed(
    mirror: Server, builder: ImageBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = builder.build_alpine_ssh_key()
    asked = len(mirror.requests)
    assert asked
    assert builder.build_alpine_ssh_key() == image
    assert len(mirror.requests) == asked


def test_a_host_without_apt_has_micro_from_alpine(
    mirror: Server, builder: ImageBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for folder in ("/usr/bin", "/bin", "/usr/sbin", "/sbin"):
        for path in Path(folder).iterdir():
            if not path.name.startswith(("apt", "dpkg")) and not (programs / path.name).exists():
                (programs / path.name).symlink_to(path)
    monkeypatch.setenv("PATH", str(programs))
    image = builder.build("micro")
    asked = len(mirror.requests)
    assert builder.build("micro") == image
    assert len(mirror.requests) == asked
    with SmolVM(config_of(image)) as vm:
        assert vm.run("uname -r").output.endswith("-virt")
        assert vm.run("cat /etc/os-release").stdout.startswith("ID=smolvm-micro")
        first = vm.run("cat /proc/sys/kernel/random/boot_id").output
        vm.reboot()
    with SmolVM(config_of(image)) as vm:
        assert vm.restored
        assert vm.run("cat /proc/sys/kernel/random/boot_id").output != first


def test_only_alpines_own_keys_are_trusted(
    mirror: Server, builder: ImageBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SMOLVM_ALPINE_KEYS")
    with pytest.raises(ImageError, match=r"is not to be trusted: it is signed by tests@.*6165ee59"):
        builder.build("alpine")
    assert not list(builder.cache_dir.glob("alpine-*/"))
    assert not list((builder.cache_dir / "alpine").rglob("APKINDEX*"))


def test_a_package_that_was_changed_on_its_way_is_refused(
    true_packages: list[Apk], signer: Signer, mirror: Server, builder: ImageBuilder, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(mirror.folder, folder)
    (apk,) = (folder / REPOSITORY).glob("apk-tools-static-*.apk")
    data = bytearray(apk.read_bytes())
    data[-2000] ^= 1
    apk.write_bytes(data)
    with pytest.raises(ImageError, match=r"apk-tools-static\S* is damaged, or not from Alpine"):
        builder.build_alpine_ssh_key(mirror=f"file://{folder}")
    assert not list(builder.cache_dir.rglob("*.apk"))
    # One that apk itself installs.
    shutil.copy(mirror.folder / REPOSITORY / apk.name, apk)
    (busybox,) = (folder / REPOSITORY).glob("busybox-1*.apk")
    data = bytearray(busybox.read_bytes())
    data[-2000] ^= 1
    busybox.write_bytes(data)
    with pytest.raises(ImageError, match="Alpine could not be installed"):
        builder.build_alpine_ssh_key(mirror=f"file://{folder}")
    assert not list(builder.cache_dir.glob("alpine-*/"))


def test_a_mirror_that_was_renewed_is_asked_anew(
    true_packages: list[Apk], signer: Signer, builder: ImageBuilder, mirror: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "renewed"
    shutil.copytree(mirror.folder, folder)
    url = f"file://{folder}"
    builder.build_alpine_ssh_key(mirror=url)
    packages = [
        replace(package, version="9.9.9-r0") if package.name == "apk-tools-static" else package
        for package in true_packages
    ]
    shutil.rmtree(folder)
    shutil.rmtree(next((builder.cache_dir / "alpine").glob("*")) / "packages")
    alpine.write_repository(folder / REPOSITORY, packages, signer)
    image = builder.build_alpine_ssh_key(mirror=url, rootfs_size_mb=256)
    assert image[1].exists()
    assert list((builder.cache_dir / "alpine").rglob("apk-tools-static-9.9.9-r0.apk"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mirror": "ftp://somewhere"}, "'ftp://somewhere' is no mirror of Alpine: give the URL"),
        ({"release": "edge"}, "'edge' is no release of Alpine: give one such as '3.23'"),
        ({"release": "3.1"}, r"there is no file:\S*/v3.1/main/\S*: this is no mirror of Alpine"),
        ({"rootfs_size_mb": 10}, "rootfs_size_mb=10 is out of range: give 64 to"),
    ],
)
def test_bad_arguments_are_explained(
    builder: ImageBuilder, tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        builder.build_alpine_ssh_key(**{"mirror": f"file://{tmp_path}", **arguments})  # type: ignore[arg-type]
    assert not list(builder.cache_dir.glob("alpine-*/"))
