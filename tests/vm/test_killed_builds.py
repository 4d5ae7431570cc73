"""kill -9 at random moments of builds that take more than one process: the next one is right.

Those of ``micro`` are in test_images. Each build is timed once, undisturbed, for the moments to lie
anywhere in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_smolvm import sharing
from pytest_smolvm.images.cache import ImageCache
from pytest_smolvm.store import Store
from tests.alpine import Server
from tests.conftest import qemu_pids

KILLS = int(os.environ.get("SMOLVM_TEST_KILLS", "1"))

PREAMBLE = """
import sys
from pathlib import Path
from pytest_smolvm import ImageBuilder, sharing
from pytest_smolvm.store import Store
"""
RECIPE = "ImageBuilder(project=sys.argv[1]).build('app')"
ALPINE = "ImageBuilder().build('alpine')"
DEBIAN = "ImageBuilder().build('debian-12')"
IMPORT = "sharing.import_image(Path(sys.argv[1]), Store(), print)"


def run(script: str, *arguments: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def images(state: Path, prefix: str) -> list[Path]:
    return [path for path in (state / "images").glob(f"{prefix}-*/") if not path.is_symlink()]


def check_whole(image: Path) -> None:
    """Every file is what was written down when it was made, and the root disk is sound."""
    digests = json.loads((image / "digests.json").read_text())
    assert "vmlinux" in digests
    for name, (size, _, digest) in digests.items():
        data = (image / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest), name
    disk = image / "rootfs.ext4"
    # One that nobody mounted, so its journal is empty.
    subprocess.run(["/sbin/e2fsck", "-fn", disk], check=True, capture_output=True)
    for layer in image.glob("*.qcow2"):
        done = subprocess.run(
            ["qemu-img", "info", "--output=json", layer], check=True, capture_output=True
        )
        assert json.loads(done.stdout)["format"] == "qcow2"
    if (image / "rootfs.qcow2").exists():
        subprocess.run(
            ["qemu-img", "check", image / "rootfs.qcow2"], check=True, capture_output=True
        )


def check_kills(
    state: Path, prefix: str, script: str, *arguments: Path, forget: Callable[[], object]
) -> None:
    moments = random.Random(prefix)  # noqa: S311 - moments, not secrets
    began = time.monotonic()
    with run(script, *arguments) as build:
        output = build.communicate(timeout=300)[0]
    assert build.returncode == 0, output
    whole_s = time.monotonic() - began
    forget()
    for _ in range(KILLS):
        moment_s = moments.uniform(0, whole_s)
        with run(script, *arguments) as build:
            with contextlib.suppress(subprocess.TimeoutExpired):
                build.wait(moment_s)
            build.kill()
        end = time.monotonic() + 2
        while (alive := qemu_pids()) and time.monotonic() < end:
            time.sleep(0.01)
        assert not alive, f"killed after {moment_s:.2f} s: {alive} live on"
        with run(script, *arguments) as build:
            output = build.communicate(timeout=300)[0]
        assert build.returncode == 0, f"killed after {moment_s:.2f} s: {output}"
        ImageCache(state / "images").sweep()
        assert not [path.name for path in (state / "images").glob(".*.*/")]
        assert not [path.name for path in (state / "templates").glob(".*")]
        store = Store(state)
        store.sweep()
        assert list(store.vms.iterdir()) == []
        for image in images(state, prefix):
            check_whole(image)
        assert images(state, prefix)
        forget()


@pytest.fixture
def state(never_built: Path) -> Path:
    return never_built


def test_a_recipe_that_is_killed(state: Path, tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text(
        "[tool.smolvm.images.app]\nbase = 'micro'\nrun = ['echo 1 > /1', 'echo 2 > /2']"
    )

    def forget() -> None:
        for image in images(state, "app"):
            shutil.rmtree(image)

    check_kills(state, "app", RECIPE, project, forget=forget)


def test_an_alpine_that_is_killed(state: Path, mirror: Server) -> None:
    def forget() -> None:
        for image in images(state, "alpine"):
            shutil.rmtree(image)
        shutil.rmtree(state / "images/alpine")

    check_kills(state, "alpine", ALPINE, forget=forget)
    assert not list(Path("/var/tmp").glob(f"smolvm-apk-{os.geteuid()}-*"))


def test_an_import_that_is_killed(
    state: Path, micro: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "micro.smolvm"
    sharing.export_image(micro[1], archive, Store(state), lambda _: None)
    other = tmp_path / "other"
    monkeypatch.setenv("SMOLVM_STATE_DIR", str(other))

    def forget() -> None:
        shutil.rmtree(other)

    check_kills(other, "micro", IMPORT, archive, forget=forget)
