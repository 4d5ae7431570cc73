"""The same tests for every backend: real guests on QEMU, and on Firecracker or its stand-in.

``SMOLVM_TEST_FIRECRACKER=/path/to/firecracker`` has them run on that, which takes KVM.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_smolvm import SSH_BOOT_ARGS, SmolVM, VMConfig, vm
from pytest_smolvm.backends import choose
from pytest_smolvm.backends.base import Backend
from pytest_smolvm.backends.firecracker import FirecrackerBackend
from pytest_smolvm.limits import host_architecture
from pytest_smolvm.store import shared_store

REAL = os.environ.get("SMOLVM_TEST_FIRECRACKER", "")
STANDIN = Path(__file__).with_name("standin")

StandIn = Callable[..., FirecrackerBackend]


def write_standin(path: Path, *options: str) -> Path:
    """A program called ``firecracker`` that is the stand-in."""
    words = shlex.join([sys.executable, str(STANDIN), *options])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def standin(tmp_path: Path) -> StandIn:
    """Makes Firecracker backends over stand-ins that record what they are asked, or go wrong."""

    def make(*options: str) -> FirecrackerBackend:
        binary = write_standin(tmp_path / "bin" / "firecracker", *options)
        return FirecrackerBackend(str(binary), "x86_64")

    return make


@pytest.fixture
def record(tmp_path: Path) -> Callable[[], list[dict[str, object]]]:
    """What a stand-in made with ``--standin-record`` of ``tmp_path/record`` was asked."""

    def read() -> list[dict[str, object]]:
        lines = (tmp_path / "record").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return read


@pytest.fixture(scope="module", params=["qemu", "firecracker"])
def backend(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    state_dir: Path,
) -> Iterator[Backend]:
    """The backend under test, which every VM of the test is on."""
    if request.param == "qemu":
        found = choose(shared_store(), "qemu")
    else:
        binary = REAL or write_standin(tmp_path_factory.mktemp("standin") / "firecracker")
        found = FirecrackerBackend(str(binary), host_architecture())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vm, "choose", lambda *_, **__: found)
        yield found


@pytest.fixture
def config(backend: Backend, micro: tuple[Path, Path]) -> VMConfig:
    return _config_of(micro)


@pytest.fixture(scope="module")
def shared(backend: Backend, micro: tuple[Path, Path]) -> Iterator[SmolVM]:
    """A guest for the tests that do not end it."""
    with SmolVM(_config_of(micro)) as guest:
        yield guest


def _config_of(image: tuple[Path, Path]) -> VMConfig:
    return VMConfig(
        kernel_path=image[0], rootfs_path=image[1], boot_args=SSH_BOOT_ARGS, mem_size_mib=256
    )


def processes_in(directory: Path) -> set[int]:
    """The processes whose working directory is that, or lies within."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            where = link.readlink()
        except OSError:
            continue
        if where == directory or directory in where.parents:
            found.add(int(link.parent.name))
    return found


def wait_until_gone(directory: Path) -> None:
    """Wait until nothing runs in that directory: the stand-in's QEMU ends a moment after it."""
    until = time.monotonic() + 10
    while left := processes_in(directory):
        assert time.monotonic() < until, f"these live on: {left}"
        time.sleep(0.01)
