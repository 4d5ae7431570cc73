"""Fixtures of the project's own tests.

Every run has a state directory of its own, so that what is left in it at the
end was left by this run; images, templates, keys and what was found out about the host are
shared with other runs, being a cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_smolvm import SSH_BOOT_ARGS, ImageBuilder, SmolVM, VMConfig
from pytest_smolvm.statedir import default_state_dir
from pytest_smolvm.store import Store

_shared_state = default_state_dir()
_BUILT_IN = ("micro-*/", "debian*/")

COMMAND = Path(sys.executable).with_name("pytest-smolvm")


@pytest.fixture(scope="session", autouse=True)
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = with_shared_caches(tmp_path_factory.mktemp("state"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOLVM_STATE_DIR", str(root))
        yield root
        # The last test's own VMs end after its fixtures: they have an owner still.
        store = Store(root)
        left = sorted(path.name for path in store.vms.glob("*") if not store.is_owned(path.name))
        assert not left, f"this run left VM directories behind: {left}"


def with_shared_caches(root: Path, *, templates: bool = True) -> Path:
    """``root``, a state directory in which images, keys and templates are those of all runs."""
    for name in ("images", "keys", "cache", *(["templates"] if templates else [])):
        (_shared_state / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        (root / name).symlink_to(_shared_state / name)
    return root


@pytest.fixture
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory with nothing in it, for one test."""
    root = tmp_path / "own-state"
    monkeypatch.setenv("SMOLVM_STATE_DIR", str(root))
    return root


@pytest.fixture
def no_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory without any template, for one test; images are there."""
    root = tmp_path / "no-templates"
    root.mkdir()
    monkeypatch.setenv("SMOLVM_STATE_DIR", str(root))
    return with_shared_caches(root, templates=False)


@pytest.fixture
def no_vms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory without any VM, for one test; images are there."""
    root = tmp_path / "no-vms"
    root.mkdir()
    monkeypatch.setenv("SMOLVM_STATE_DIR", str(root))
    return with_shared_caches(root)


@pytest.fixture
def never_built(no_templates: Path) -> Path:
    """The state directory of a host on which no image was ever built but the built-in ones."""
    images = no_templates / "images"
    images.unlink()
    images.mkdir()
    for pattern in _BUILT_IN:
        for path in (_shared_state / "images").glob(pattern):
            (images / path.name).symlink_to(path)
    return no_templates


@pytest.fixture(scope="session")
def micro(state_dir: Path) -> tuple[Path, Path]:
    """Kernel and root disk of the default image."""
    return ImageBuilder().build_micro_ssh_key()


@pytest.fixture
def micro_config(micro: tuple[Path, Path]) -> VMConfig:
    return VMConfig(
        kernel_path=micro[0], rootfs_path=micro[1], boot_args=SSH_BOOT_ARGS, mem_size_mib=256
    )


@pytest.fixture
def plain_files(tmp_path: Path) -> dict[str, Path]:
    """Paths for a VMConfig that is never booted."""
    kernel, rootfs = tmp_path / "vmlinux", tmp_path / "rootfs.ext4"
    kernel.write_bytes(b"kernel")
    rootfs.write_bytes(b"rootfs")
    return {"kernel_path": kernel, "rootfs_path": rootfs}


@pytest.fixture(scope="session")
def shared_guest(micro: tuple[Path, Path]) -> Iterator[SmolVM]:
    """One guest for all tests that do not test isolation or the life of a VM."""
    config = VMConfig(
        kernel_path=micro[0], rootfs_path=micro[1], boot_args=SSH_BOOT_ARGS, mem_size_mib=256
    )
    with SmolVM(config) as vm:
        yield vm


@pytest.fixture
def guest(shared_guest: SmolVM) -> SmolVM:
    if shared_guest.status != "running":
        pytest.fail(f"the shared guest is {shared_guest.status}:\n{shared_guest.console[-2000:]}")
    return shared_guest


def changed(config: VMConfig, **fields: Any) -> VMConfig:
    return config.model_copy(update=fields)


def cli(*arguments: str, expected: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command pytest-smolvm as a user does, in a process of its own."""
    done = subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done


def qemu_pids() -> set[int]:
    """The QEMU processes of this run: those whose files lie in its state directory."""
    ours = os.fsencode(os.environ["SMOLVM_STATE_DIR"])
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            argv = path.read_bytes().split(b"\0")
        except OSError:
            continue
        # Not setpriv, which is about to become QEMU.
        if b"qemu-system" in argv[0] and any(ours in argument for argument in argv):
            found.add(int(path.parent.name))
    return found
