"""The image `micro`: built once, whole or not at all, by anybody."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytest_smolvm import SSH_BOOT_ARGS, ImageBuilder, ImageError, SmolVM, VMConfig
from pytest_smolvm.images.cache import ImageCache
from pytest_smolvm.images.debian import DebianPackages
from pytest_smolvm.images.kernel import ELF_MAGIC
from pytest_smolvm.images.toolbox import DEBIAN_KERNELS, DEBIAN_PACKAGES
from pytest_smolvm.statedir import try_lock

KILLS = int(os.environ.get("SMOLVM_TEST_KILLS", "4"))

BUILD = """
import sys
from pytest_smolvm import ImageBuilder
builder = ImageBuilder(sys.argv[1], progress=lambda line: print(line, flush=True))
print("BUILT", *builder.build_micro_ssh_key(name=sys.argv[2]))
"""


@pytest.fixture
def cache(tmp_path: Path, micro: tuple[Path, Path]) -> Path:
    """A cache with the packages in it, but no image."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "debian").symlink_to(micro[0].parents[1] / "debian")
    return cache


def start_build(cache: Path, name: str = "micro") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(cache), name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def images(cache: Path) -> list[str]:
    others = ("debian", "alpine")
    return sorted(
        path.name for path in cache.iterdir() if path.is_dir() and path.name not in others
    )


def test_an_image_is_a_kernel_its_initrd_and_a_root_disk(micro: tuple[Path, Path]) -> None:
    kernel, rootfs = micro
    assert kernel.name == "vmlinux"
    assert kernel.read_bytes()[:4] == ELF_MAGIC
    assert kernel.with_name("vmlinux.initrd").read_bytes()[:6] == b"070701"
    assert rootfs.stat().st_size == 128 << 20
    manifest = json.loads(rootfs.with_name("rootfs.ext4.smolvm.json").read_text())
    assert manifest["host_key"].startswith("ssh-ed25519 ")
    assert "busybox-static" in manifest["packages"]
    assert len(manifest["authorized_keys"]) == 1


def test_a_second_request_builds_nothing(cache: Path) -> None:
    lines: list[str] = []
    builder = ImageBuilder(cache, progress=lines.append)
    first = builder.build_micro_ssh_key()
    assert any("ready" in line for line in lines)
    lines.clear()
    assert builder.build_micro_ssh_key() == first
    assert lines == []


def test_what_goes_into_an_image_decides_which_image_it_is(cache: Path) -> None:
    builder = ImageBuilder(cache, progress=lambda _: None)
    one, rootfs = builder.build_micro_ssh_key()
    other, larger = builder.build_micro_ssh_key(rootfs_size_mb=64)
    assert one != other
    assert larger.stat().st_size == 64 << 20
    keys = {
        json.loads(path.with_name("rootfs.ext4.smolvm.json").read_text())["host_key"]
        for path in (rootfs, larger)
    }
    assert len(keys) == 2, "each image has a host key of its own"


def test_processes_that_build_at_once_build_once(cache: Path) -> None:
    builds = [start_build(cache) for _ in range(8)]
    outputs = [build.communicate(timeout=300)[0] for build in builds]
    assert [build.returncode for build in builds] == [0] * 8
    assert sum("making the root disk" in output for output in outputs) == 1
    assert len({output.split("BUILT ")[1] for output in outputs}) == 1
    assert len(images(cache)) == 1


def test_threads_that_build_at_once_build_once(cache: Path) -> None:
    lines: list[str] = []
    builder = ImageBuilder(cache, progress=lines.append)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = set(pool.map(lambda _: builder.build_micro_ssh_key(), range(4)))
    assert len(results) == 1
    assert sum("making the root disk" in line for line in lines) == 1


@pytest.mark.parametrize("at", ["unpacking the kernel", "making the root disk"])
def test_a_build_killed_half_way_leaves_nothing_that_passes_for_whole(cache: Path, at: str) -> None:
    build = start_build(cache)
    with build:
        assert build.stdout is not None
        while at not in (line := build.stdout.readline()):
            assert line, "the build ended before it got there"
        time.sleep(0.05)
        build.send_signal(signal.SIGKILL)
        build.wait(30)
    assert not any(name.startswith("micro-") for name in images(cache))
    again = start_build(cache)
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output
    assert len(images(cache)) == 1, "what the killed build left is gone"
    for name in ("vmlinux", "vmlinux.initrd", "rootfs.ext4", "rootfs.ext4.smolvm.json"):
        assert (cache / images(cache)[0] / name).stat().st_size > 0


def test_whenever_a_build_is_killed_the_next_one_is_right(cache: Path) -> None:
    moments = random.Random(20)  # noqa: S311 - moments, not secrets
    began = time.monotonic()
    with start_build(cache) as build:
        assert build.wait(300) == 0
    whole_s = time.monotonic() - began
    shutil.rmtree(cache / images(cache)[0])
    for _ in range(KILLS):
        moment_s = moments.uniform(0, whole_s)
        with start_build(cache) as build:
            with contextlib.suppress(subprocess.TimeoutExpired):
                build.wait(moment_s)
            build.kill()
        with start_build(cache) as build:
            output = build.communicate(timeout=300)[0]
        assert build.returncode == 0, f"killed after {moment_s:.2f} s: {output}"
        # One that was whole already, but for its clearing up.
        ImageCache(cache).sweep()
        (image,) = (cache / name for name in images(cache))
        digests = json.loads((image / "digests.json").read_text())
        assert sorted(digests) == ["rootfs.ext4", "vmlinux", "vmlinux.initrd"]
        for name, (size, _, digest) in digests.items():
            data = (image / name).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest)
        done = subprocess.run(["/sbin/e2fsck", "-fn", image / "rootfs.ext4"], check=False)
        assert done.returncode == 0
        shutil.rmtree(image)


def test_what_a_killed_build_left_goes_with_the_next_one_of_any_image(cache: Path) -> None:
    left = cache / ".other-0123456789abcdef.x7f_2k1"
    (left / "work").mkdir(parents=True)
    building = cache / ".third-0123456789abcdef.aaaaaaaa"
    building.mkdir()
    lock = try_lock(cache / "third-0123456789abcdef.lock")
    assert lock is not None
    ImageBuilder(cache, progress=lambda _: None).build_micro_ssh_key()
    assert not left.exists()
    assert building.exists(), "it has an owner"
    lock.release()


def test_a_guest_has_what_users_expect(micro: tuple[Path, Path]) -> None:
    config = VMConfig(
        kernel_path=micro[0], rootfs_path=micro[1], boot_args=SSH_BOOT_ARGS, mem_size_mib=256
    )
    with SmolVM(config) as vm:
        assert vm.run("id -u").output == "0"
        assert vm.run("mount | grep ' / '").output.startswith("/dev/vda on / type ext4 (rw")
        assert vm.run("ls /sys/class/net").stdout.split() == ["eth0", "lo"]
        assert vm.run("cat /sys/class/misc/hw_random/rng_current").output.startswith("virtio_rng")
        assert vm.run("ls -ld /tmp").output.startswith("drwxrwxrwt")
        # Programs from the host's kind of system run there: the C library is whole.
        assert vm.run("/lib64/ld-linux-x86-64.so.2 --version").ok
        assert abs(int(vm.run("date +%s").output) - time.time()) < 5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"public_key": "no key"}, "'no key' is not a public key"),
        ({"public_key": "ssh-ed25519 AAAA\nssh-ed25519 BBBB"}, "single line"),
        ({"name": "../micro"}, "'../micro' is no name"),
        ({"rootfs_size_mb": 1}, "rootfs_size_mb=1 is out of range"),
        ({"rootfs_size_mb": -5}, "rootfs_size_mb=-5 is out of range"),
    ],
)
def test_wrong_arguments_are_named_and_build_nothing(
    cache: Path, arguments: dict[str, object], named: str
) -> None:
    with pytest.raises(ImageError) as caught:
        ImageBuilder(cache).build_micro_ssh_key(**arguments)  # type: ignore[arg-type]
    assert named in str(caught.value)
    assert images(cache) == []


def test_without_a_network_the_error_says_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An archive that is not there: a proxy on a port that nobody listens on.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ImageError, match="is the network up"):
        ImageBuilder(tmp_path, progress=lambda _: None).build_micro_ssh_key()
    assert images(tmp_path) == []


def test_a_host_without_apt_is_told_what_to_do_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SMOLVM_ALPINE_MIRROR", "http://127.0.0.1:9/alpine")
    with pytest.raises(ImageError, match=r"(?s)could not be downloaded: .*SMOLVM_ALPINE_MIRROR"):
        ImageBuilder(tmp_path / "cache").build_micro_ssh_key()
    assert images(tmp_path / "cache") == []


def test_what_is_cached_is_asked_for_again_when_the_package_lists_have_changed(
    micro: tuple[Path, Path], tmp_path: Path
) -> None:
    # As after an apt-get update of the host, with the package files there already.
    cache = micro[0].parents[1] / "debian"
    (tmp_path / "archives").symlink_to(cache / "archives")
    first = DebianPackages(tmp_path, print).resolve(DEBIAN_PACKAGES, DEBIAN_KERNELS["x86_64"])
    (memory,) = tmp_path.glob("resolved-*.json")
    memory.unlink()
    again = DebianPackages(tmp_path, print)
    assert again.resolve(DEBIAN_PACKAGES, DEBIAN_KERNELS["x86_64"]) == first
    assert {*DEBIAN_PACKAGES, "libc6"} <= {package.name for package in first}
    assert all(path.exists() for path in again.download(first))


def test_packages_that_apt_says_nothing_of_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = DebianPackages(tmp_path, print)
    monkeypatch.setattr(packages, "_run", lambda *_arguments, **_options: "Depends: linux-image-1")
    with pytest.raises(ImageError, match="did not say where busybox-static, dropbear-bin can be"):
        packages.resolve(DEBIAN_PACKAGES, DEBIAN_KERNELS["x86_64"])
