"""A disk of the host that fills up: said at once, nothing half-made taken for whole, nothing lost.

Each test runs in a mount namespace of its own, in which a small file system lies where the state
directory is; so no rights are needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PREAMBLE = """
import os, subprocess, sys
from pathlib import Path
from pytest_smolvm import SSH_BOOT_ARGS, BackendError, ImageBuilder, ImageError, SmolVM, VMConfig
state, images = Path(os.environ["SMOLVM_STATE_DIR"]), Path(sys.argv[1])

def mount(mib, *options):
    options = ",".join(["mode=700", *options, f"size={mib}m"])
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", state], check=True)

def left():
    return sorted(p.name for p in (state / "images").iterdir() if p.is_dir() and not p.is_symlink())
"""

VM = """
mount(60)
(state / "images").symlink_to(images)
(state / "keys").symlink_to(images.parent / "keys")
kernel, rootfs = ImageBuilder().build("micro")
config = VMConfig(kernel_path=kernel, rootfs_path=rootfs, boot_args=SSH_BOOT_ARGS)
with SmolVM(config, restore=False) as vm:
    vm.run("echo before > /before && sync").check()
    try:
        vm.run("dd if=/dev/urandom of=/big bs=1M count=90 && sync", 300)
        raise SystemExit("there was room?")
    except BackendError as error:
        print(error)
    print(vm.status)
    try:
        vm.run("true")
    except BackendError as error:
        print("again:", error)
    mount(200, "remount")
    vm.resume()
    print(vm.status, vm.run("cat /before; sync; ls /big").stdout.split())
print(sorted(p.name for p in (state / "vms").iterdir()))
"""

MICRO = """
errors = set()
for mib in [1, 2, 5, 10, 15, 20, 30, 40, 60, 80, 120, 200]:
    mount(mib)
    (state / "images").mkdir()
    (state / "images/debian").symlink_to(images / "debian")
    try:
        kernel, rootfs = ImageBuilder(progress=lambda _: None).build("micro")
    except ImageError as error:
        errors.add(str(error))
        assert left() == [], left()
        subprocess.run(["umount", state], check=True)
    else:
        break
print(len(errors) > 0, mib)
for error in errors:
    assert any(words in error for words in ("No space left", "needs some")), error
config = VMConfig(kernel_path=kernel, rootfs_path=rootfs, boot_args=SSH_BOOT_ARGS)
with SmolVM(config, restore=False) as vm:
    print(vm.run("echo whole").output)
"""

RECIPE = """
project = Path(sys.argv[2])
project.write_text('''
[tool.smolvm.images.app]
base = "micro"
run = ["dd if=/dev/urandom of=/big bs=1M count=60 && sync"]
''')
mount(135)
(state / "images").mkdir()
(state / "keys").symlink_to(images.parent / "keys")
for path in images.iterdir():
    if path.name == "debian" or (path.name.startswith("micro-") and path.is_dir()):
        (state / "images" / path.name).symlink_to(path)
filler = state / "filler"

def fill(line):
    # Once it is under way: room is looked for before.
    if "running dd" in line:
        filler.write_bytes(bytes(100 << 20))

builder = ImageBuilder(progress=fill, project=project)
try:
    builder.build("app")
    raise SystemExit("there was room?")
except ImageError as error:
    print(error)
print(left(), sorted(p.name for p in (state / "vms").iterdir()))
filler.unlink()
mount(400, "remount")
kernel, rootfs = ImageBuilder(progress=lambda _: None, project=project).build("app")
config = VMConfig(kernel_path=kernel, rootfs_path=rootfs, boot_args=SSH_BOOT_ARGS)
with SmolVM(config, restore=False) as vm:
    print(vm.run("stat -c %s /big").output)
"""


def run(script: str, state: Path, *arguments: Path) -> str:
    """Run ``script`` where ``state`` can be mounted over; return what it printed."""
    unshare = shutil.which("unshare")
    assert unshare is not None
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    done = subprocess.run(
        [unshare, *user, "--mount", sys.executable, "-c", PREAMBLE + script, *arguments],
        env={**os.environ, "SMOLVM_STATE_DIR": str(state)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    return folder


def test_a_vm_whose_disk_cannot_grow_says_so_and_goes_on_later(
    micro: tuple[Path, Path], state: Path
) -> None:
    said = run(VM, state, micro[0].parents[1]).splitlines()
    assert "stands still" in said[0]
    assert "No space left on device" in said[0]
    assert "resume() lets the VM go on" in said[0]
    assert "again: the VM" in "\n".join(said)
    assert said[-2:] == ["running ['before', '/big']", "[]"]


def test_micro_on_a_disk_too_small_is_whole_or_not_there(
    micro: tuple[Path, Path], state: Path
) -> None:
    said = run(MICRO, state, micro[0].parents[1].resolve()).splitlines()
    assert said[0].startswith("True")
    assert said[1] == "whole"


def test_a_step_whose_disk_fills_up_fails_at_once(
    micro: tuple[Path, Path], state: Path, tmp_path: Path
) -> None:
    images = micro[0].parents[1].resolve()
    said = run(RECIPE, state, images, tmp_path / "pyproject.toml")
    assert "building the image 'app' failed at: running dd" in said
    assert "No space left on device" in said
    assert said.splitlines()[-2:] == ["['logs'] []", str(60 << 20)]
