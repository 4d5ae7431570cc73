"""``pytest-smolvm image``: what there is, what uses it, what goes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from pytest_smolvm import SSH_BOOT_ARGS, SmolVM, VMConfig
from tests.conftest import cli

RECIPE = """
[tool.smolvm.images.app]
base = "micro"
run = ["echo said by the command; echo built > /built"]
[tool.smolvm.images.bad]
base = "micro"
run = ["echo half > /half; false"]
"""


@pytest.fixture
def state(
    micro: tuple[Path, Path], own_state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A host on which nothing was built yet, but where the packages are; and a project."""
    images = own_state / "images"
    images.mkdir(parents=True)
    (images / "debian").symlink_to(micro[0].parents[1] / "debian")
    (tmp_path / "pyproject.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return own_state


def listed() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(cli("image", "list", "--json").stdout)
    return found


def keys() -> list[str]:
    return [entry["key"] for entry in listed()]


def test_images_are_built_listed_and_removed(state: Path) -> None:
    assert "no images" in cli("image", "list").stdout
    assert listed() == []
    built = cli("image", "build", "app", "--progress")
    assert "image app: running echo said by the command" in built.stderr
    assert "\nsaid by the command\n" in built.stderr
    kernel, rootfs = (Path(line.split(": ")[1]) for line in built.stdout.splitlines())
    again = cli("image", "build", "app")
    assert (again.stdout, again.stderr) == (built.stdout, "")
    app, micro = listed()
    assert (app["name"], micro["name"]) == ("app", "micro")
    assert app["key"] == rootfs.parent.name
    assert app["origin"].startswith(f"{micro['key']}, then running")
    # What both have is counted with each, but neither would free it alone.
    assert micro["size_bytes"] > 60 << 20
    assert micro["own_bytes"] < app["own_bytes"] < 8 << 20
    text = cli("image", "list").stdout
    assert text.splitlines()[0].split()[:4] == ["IMAGE", "AGE", "UNUSED", "SIZE"]
    assert app["key"] in text
    # An image goes by itself: what it shares with another stays.
    cli("image", "rm", "micro")
    assert keys() == [app["key"]]
    with SmolVM(
        VMConfig(kernel_path=kernel, rootfs_path=rootfs, boot_args=SSH_BOOT_ARGS), restore=False
    ) as vm:
        assert vm.run("cat /built").output == "built"
        refused = cli("image", "rm", "app", expected=1).stderr
        assert f"is used by {vm.vm_id}" in refused
        assert listed()[0]["used_by"] == [vm.vm_id]
        assert "nothing" in cli("image", "prune", "--keep-days=0").stdout
    cli("image", "rm", app["key"])
    assert keys() == []
    assert not list((state / "images").glob(".*"))
    assert not list((state / "images").glob("app*"))


def test_the_vm_of_a_failed_step_can_be_looked_into(state: Path) -> None:
    failed = cli("image", "build", "bad", "--keep-failed", expected=1).stderr
    vm_id = failed.strip().rpartition("pytest-smolvm ssh ")[2]
    assert "failed at: running echo half" in failed
    assert vm_id in cli("ps").stdout
    assert cli("ssh", vm_id, "cat", "/half").stdout == "half\n"
    # The image under it stays for as long as it does.
    assert f"is used by {vm_id}" in cli("image", "rm", "micro", expected=1).stderr
    cli("rm", vm_id)
    cli("image", "rm", "micro")


def test_what_nobody_asked_for_goes(state: Path) -> None:
    for number in range(3):
        (state / "images" / f"old-{number}").mkdir()
        folder = state / "images" / f"old-{number}"
        (folder / "rootfs.ext4").write_bytes(os.urandom(1 << 20))
        made = {"name": "old", "architecture": "x86_64", "created_at": time.time() - 90 * 86400}
        (folder / "image.json").write_text(json.dumps(made))
        used = time.time() - (9 + 10 * number) * 86400
        os.utime(folder / "image.json", (used, used))
    assert json.loads(cli("image", "prune", "--json").stdout) == {"removed": []}
    assert cli("image", "prune", "--keep-days=25").stdout == "removed: old-2\n"
    # The longest unused one, since there is room for one only.
    assert cli("image", "prune", "--max-mib=2").stdout == "removed: old-1\n"
    assert keys() == ["old-0"]


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["build", "nope"], 1, "there is no image called 'nope': the images are micro, debian"),
        (["rm", "nope"], 1, "there is no image 'nope' in the cache: there are none"),
        (["rm"], 2, "Missing argument"),
        (["prune", "--keep-days=-1"], 2, "keep-days"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_what_is_called_wrongly_is_said(
    state: Path, arguments: list[str], status: int, named: str
) -> None:
    assert named in cli("image", *arguments, expected=status).stderr
