"""Images of whole distributions: built, imported, booted, restored; each proves what it is."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_smolvm import SSH_BOOT_ARGS, ImageBuilder, ImageError, SmolVM, VMConfig
from pytest_smolvm.images import bootstrap
from tests.alpine import Server

PROBE = ". /etc/os-release; echo $ID $VERSION_ID"


@pytest.fixture(scope="module")
def packages(micro: tuple[Path, Path]) -> Path:
    """The Debian packages that our own part of each image is made of."""
    return micro[0].parents[1] / "debian"


@pytest.fixture(scope="module")
def builder(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageBuilder:
    """One for images that no other run has a use for."""
    cache = tmp_path_factory.mktemp("images")
    (cache / "debian").symlink_to(packages)
    return ImageBuilder(cache, progress=lambda _: None)


@pytest.fixture(scope="module")
def debian_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Debian, as anybody makes one."""
    tar = tmp_path_factory.mktemp("debian") / "plain.tar"
    bootstrap.make_debian_tar("bookworm", ["dash"], "amd64", None, tar, lambda _: None)
    return tar


def config_of(image: tuple[Path, Path], **fields: object) -> VMConfig:
    return VMConfig(kernel_path=image[0], rootfs_path=image[1], boot_args=SSH_BOOT_ARGS, **fields)


@pytest.mark.parametrize(
    ("name", "version", "python"), [("debian-12", "12", "3.11"), ("debian-13", "13", "3.13")]
)
def test_a_debian_has_apt_python_and_its_kernels_modules(
    state_dir: Path, name: str, version: str, python: str
) -> None:
    builder = ImageBuilder(progress=lambda _: None)
    image = builder.build(name)
    assert builder.build(name) == image
    with SmolVM(config_of(image)) as vm:
        assert vm.run(PROBE).output == f"debian {version}"
        assert vm.run("python3 --version").output.startswith(f"Python {python}.")
        assert vm.run("apt-get --version && apt-cache policy").ok
        assert "Status: install ok installed" in vm.run("dpkg -s apt").stdout
        assert vm.run("modprobe dummy && cat /sys/module/dummy/initstate").output == "live"
        modes = vm.run("stat -c '%a %U:%G' /etc/shadow /usr/bin/passwd /tmp").stdout
        assert modes.splitlines() == ["640 root:shadow", "4755 root:root", "1777 root:root"]
        assert vm.run("test -s /etc/machine-id && hostname").output == vm.vm_id


def test_an_alpine_disk_boots_with_its_own_kernel(builder: ImageBuilder, alpine_disk: Path) -> None:
    before = alpine_disk.stat()
    image = builder.from_rootfs(alpine_disk)
    assert image[1].parent.name.startswith("alpine-3.23")
    with SmolVM(config_of(image)) as vm:
        probe = vm.run(PROBE).output
        assert probe.startswith("alpine 3.23")
        assert vm.run("uname -r").output.endswith("-virt")
        assert vm.run("ldd /bin/busybox; apk --version").ok, "its C library is musl"
        assert "libc.musl" in vm.run("ldd /bin/busybox").stdout
        assert vm.run("modprobe dummy && cat /sys/module/dummy/initstate").output == "live"
    after = alpine_disk.stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)


def test_a_kernel_that_is_given_is_the_one_that_boots(
    builder: ImageBuilder, alpine_disk: Path
) -> None:
    # Alpine's kernel, whose drivers are modules that only its own disk has.
    kernel = next(alpine_disk.parent.glob("*.kernel"))
    image = builder.from_rootfs(alpine_disk, kernel=kernel, name="alpine-with-kernel")
    with SmolVM(config_of(image), restore=False) as vm:
        assert vm.run("uname -r").output.endswith("-virt")


def test_a_plain_debian_archive_becomes_an_image(
    builder: ImageBuilder, debian_tar: Path, no_templates: Path, tmp_path: Path
) -> None:
    image = builder.from_rootfs(debian_tar, name="plain")
    again = ImageBuilder(builder.cache_dir, progress=lambda line: pytest.fail(line))
    assert again.from_rootfs(debian_tar, name="plain") == image
    (tmp_path / "file").write_text("from the host")
    config = config_of(image)
    with SmolVM(config) as vm:
        assert vm.run(PROBE).output == "debian 12"
        assert vm.run("cat /proc/1/comm").output == "init"
        vm.put(tmp_path / "file", "/srv/file")
        vm.get("/etc/debian_version", tmp_path / "version")
        assert (tmp_path / "version").read_text().startswith("12")
        vm.set_env_vars({"MODE": "test"})
        assert vm.run("echo $MODE").output == "test"
        # Of the distribution's own files none was changed.
        changed = vm.run("dpkg --verify")
        assert changed.stdout == ""
        first = vm.run("cat /proc/sys/kernel/random/boot_id; hostname").stdout
    with SmolVM(config) as vm:
        assert vm.restored
        assert vm.run("test -e /srv/file").exit_code == 1
        assert vm.run("cat /proc/sys/kernel/random/boot_id; hostname").stdout != first
        vm.run("echo kept > /srv/kept").check()
        vm.reboot()
        assert vm.run("cat /srv/kept").output == "kept"
        vm.stop(20)
        vm.start()
        assert vm.run("cat /srv/kept").output == "kept", "it was switched off properly"


def test_many_share_an_imported_disk_read_only(builder: ImageBuilder, debian_tar: Path) -> None:
    image = builder.from_rootfs(debian_tar, name="plain")
    with SmolVM(config_of(image, disk_mode="shared", env_vars={"A": "b"})) as vm:
        assert vm.run("touch /file").exit_code == 1
        assert vm.run("touch /tmp/file && echo $A").output == "b"


def test_a_directory_becomes_an_image(
    builder: ImageBuilder, debian_tar: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "my tree"
    tree.mkdir()
    with tarfile.open(debian_tar) as tar:
        tar.extractall(tree, filter="tar")
    (tree / "etc/motd").write_text("this very tree")
    image = builder.from_rootfs(tree)
    assert image[1].parent.name.startswith("my-tree-")
    with SmolVM(config_of(image), restore=False) as vm:
        assert vm.run("cat /etc/motd").output == "this very tree"
    (tree / "etc/motd").write_text("changed")
    assert builder.from_rootfs(tree) != image, "other contents, another image"


def test_what_cannot_be_a_guest_is_refused(builder: ImageBuilder, tmp_path: Path) -> None:
    tree = tmp_path / "scratch"
    (tree / "etc").mkdir(parents=True)
    (tree / "hello").write_text("a program")
    with pytest.raises(ImageError, match="has no /bin/sh: a guest needs a shell"):
        builder.from_rootfs(tree)
    with pytest.raises(ImageError, match="does not exist: give the path of one"):
        builder.from_rootfs(tmp_path / "nothing")
    with pytest.raises(ImageError, match=r"use one of 12 \(bookworm\), 13 \(trixie\)"):
        builder.build_debian_ssh_key(release="11")
    assert not list(builder.cache_dir.glob("scratch-*/"))
    assert not list(builder.cache_dir.glob(".scratch-*"))


def test_without_mmdebstrap_the_line_that_installs_it_is_said(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = ImageBuilder(tmp_path / "cache", progress=lambda _: None)
    (tmp_path / "cache/debian").symlink_to(packages)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("apt-get", "apt-cache", "dpkg-deb", "setpriv"):
        path = shutil.which(name)
        assert path is not None
        (programs / name).symlink_to(path)
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(ImageError, match=r"'mmdebstrap' is not installed.* install mmdebstrap"):
        builder.build_debian_ssh_key()
    assert sorted(path.name for path in builder.cache_dir.iterdir() if path.is_dir()) == ["debian"]


KILLED = """
import sys
from pathlib import Path
from pytest_smolvm.images.bootstrap import make_debian_tar
make_debian_tar("bookworm", ["dash"], "amd64", None, Path(sys.argv[1]), print)
"""


def bootstraps() -> tuple[list[str], list[str], list[str]]:
    """What there is of bootstraps on this host: processes, mounts, folders."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"mmdebstrap" in path.read_bytes():
                found.append(path.parent.name)
    mounts = [
        line for line in Path("/proc/mounts").read_text().splitlines() if "mmdebstrap" in line
    ]
    folders = [str(path) for path in Path("/var/tmp").glob(f"smolvm-mmdebstrap-{os.geteuid()}-*")]
    return found, mounts, folders


def test_of_a_bootstrap_that_is_killed_nothing_stays(tmp_path: Path) -> None:
    if bootstraps()[0]:
        pytest.skip("another one is under way on this host")
    with subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "a.tar"]) as build:
        end = time.monotonic() + 60
        # As deep in it as can be: with a root file system that has its own /proc by now.
        while not list(Path("/var/tmp").glob("smolvm-mmdebstrap-*/mmdebstrap.*/usr/bin/dpkg")):
            assert time.monotonic() < end, "mmdebstrap has not come that far"
            assert build.poll() is None
            time.sleep(0.05)
        build.kill()
    end = time.monotonic() + 10
    while bootstraps()[0] and time.monotonic() < end:
        time.sleep(0.02)
    processes, mounts, folders = bootstraps()
    assert (processes, mounts) == ([], [])
    assert len(folders) == 1
    # The next one, that fails at once, clears it away.
    with pytest.raises(ImageError, match="Debian bookworm could not be made"):
        bootstrap.make_debian_tar(
            "bookworm", ["no-such-package"], "amd64", None, tmp_path / "b.tar", print
        )
    assert bootstraps() == ([], [], [])


# Nothing of a guest's life takes rights that a user lacks, its way out neither.
ORDINARY_USER = """
import os, sys
assert os.geteuid() == 65534
from pytest_smolvm import ImageBuilder, SmolVM, SSH_BOOT_ARGS, VMConfig
with open("pyproject.toml", "w") as file:
    file.write("[tool.smolvm.images.app]\\nbase = 'alpine'\\n")
    file.write("run = ['echo ID=app > /etc/os-release']")
builder = ImageBuilder(project="pyproject.toml")
images = {
    "micro": builder.build("micro"),
    "debian": builder.build("debian"),
    "alpine": builder.build("alpine"),
    "imported": builder.from_rootfs(sys.argv[1]),
    "layered": builder.build("app"),
    "arm64": builder.build("micro", arch="aarch64"),
}
for name, (kernel, rootfs) in images.items():
    config = VMConfig(
        kernel_path=kernel, rootfs_path=rootfs, boot_args=SSH_BOOT_ARGS, network="nat"
    )
    with SmolVM(config, restore=False) as vm:
        done = vm.run(". /etc/os-release; echo $ID; id -u; stat -c %u:%g /etc/passwd /root")
        print(name, *done.check().stdout.split())
"""


@pytest.fixture
def open_home() -> Iterator[Path]:
    """A directory in which any user may have one."""
    home = Path("/var/tmp") / f"smolvm-test-{os.getpid()}"
    home.mkdir(mode=0o755)
    yield home
    shutil.rmtree(home)


def test_an_ordinary_user_builds_and_boots_each(
    open_home: Path, alpine_disk: Path, mirror: Server
) -> None:
    """From nothing: no packages, no keys, no root rights."""
    if os.geteuid() != 0:
        pytest.skip("this run is an ordinary user's already")
    python = shutil.which("python3", path="/usr/bin")
    if python is None or not same_version(python):
        pytest.skip("ordinary users can reach no Python of this version here")
    source, packages, state = (open_home / name for name in ("source", "packages", "state"))
    shutil.copytree(Path(__file__).parents[2] / "pytest_smolvm", source / "pytest_smolvm")
    site = next(path for path in sys.path if path.endswith("site-packages"))
    leave_out = shutil.ignore_patterns("__pycache__", "*mypy*", "quicksand*")
    shutil.copytree(site, packages, ignore=leave_out)
    shutil.copy(alpine_disk, open_home / "alpine.qcow2")
    shutil.copytree(os.environ["SMOLVM_ALPINE_KEYS"], open_home / "keys")
    state.mkdir()
    os.chown(state, 65534, 65534)
    # What an administrator gives to each user (subuid(5)), for this test's processes only.
    ids = open_home / "ids"
    ids.write_text("nobody:200000:65536\n")
    # And what udev does for all, which runs in few containers.
    tun = open_home / "tun"
    os.mknod(tun, 0o600 | stat.S_IFCHR, os.makedev(10, 200))
    tun.chmod(0o666)
    script = (
        f"mount --bind {ids} /etc/subuid && mount --bind {ids} /etc/subgid && "
        f"mount --bind {tun} /dev/net/tun && "
        'exec setpriv --reuid 65534 --regid 65534 --clear-groups "$0" "$@"'
    )
    done = subprocess.run(
        [
            *("unshare", "--mount", "sh", "-ec", f"touch /etc/subuid /etc/subgid; {script}"),
            *(python, "-c", ORDINARY_USER, open_home / "alpine.qcow2"),
        ],
        cwd=state,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(state),
            "SMOLVM_STATE_DIR": str(state / "smolvm"),
            "PYTHONPATH": f"{source}:{packages}",
            "SMOLVM_ALPINE_MIRROR": mirror.url,
            "SMOLVM_ALPINE_KEYS": str(open_home / "keys"),
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "micro smolvm-micro 0 0:0 0:0",
        "debian debian 0 0:0 0:0",
        "alpine alpine 0 0:0 0:0",
        "imported alpine 0 0:0 0:0",
        "layered app 0 0:0 0:0",
        "arm64 smolvm-micro 0 0:0 0:0",
    ]


def same_version(python: str) -> bool:
    script = "import sys; print(*sys.version_info[:2])"
    found = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    return found.stdout.split() == [str(part) for part in sys.version_info[:2]]
