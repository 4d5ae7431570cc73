"""Images for other machines: exported with a booted guest, imported, found for their recipe."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from pytest_smolvm import ImageBuilder, ImageError, SmolVM, sharing
from pytest_smolvm.store import Store
from tests.conftest import cli, with_shared_caches
from tests.vm.test_distributions import config_of

RECIPE = """
[tool.smolvm.images.app]
base = "micro"
run = ["echo built > /built", "echo again >> /built"]
"""
Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("project") / "pyproject.toml"
    source.write_text(RECIPE)
    return source


@pytest.fixture(scope="module")
def exported(
    micro: tuple[Path, Path], project: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An archive of the recipe's image, from a host of its own."""
    root = with_shared_caches(tmp_path_factory.mktemp("host-a"), templates=False)
    (root / "images").unlink()
    (root / "images").mkdir()
    for path in (micro[0].parent, micro[0].parents[1] / "debian"):
        (root / "images" / path.name).symlink_to(path)
    target = root / "app.smolvm"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOLVM_STATE_DIR", str(root))
        _, rootfs = ImageBuilder(project=project, progress=lambda _: None).build("app")
        done = sharing.export_image(rootfs, target, Store(root), lambda _: None)
    assert done.templates == 1
    assert target.stat().st_size < 200 << 20
    return target


@pytest.fixture
def small(exported: Path, tmp_path: Path) -> tuple[Path, Members]:
    """An archive whose files are small, and what lies in it."""
    manifest, members = {}, []
    with (
        exported.open("rb") as file,
        zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as plain,
        tarfile.open(fileobj=plain, mode="r|") as tar,
    ):
        for member in tar:
            data = tar.extractfile(member)
            assert data is not None
            if member.name == "manifest.json":
                manifest = json.loads(data.read())
            else:
                members.append((member.name, data.read(4096)))
    manifest["templates"] = {}
    members = [(name, data) for name, data in members if not name.startswith("templates/")]
    manifest["files"] = {
        name: {
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "data_bytes": len(data),
        }
        for name, data in members
    }
    members.insert(0, ("manifest.json", json.dumps(manifest).encode()))
    return tmp_path / "small.smolvm", members


def write(path: Path, members: Members) -> None:
    with (
        path.open("wb") as file,
        zstandard.ZstdCompressor().stream_writer(file) as stream,
        tarfile.open(fileobj=stream, mode="w|") as tar,
    ):
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def left(root: Path) -> list[str]:
    """What an import left, but for lock files."""
    folders = [root / "images", root / "templates", root / "keys/imported"]
    return [
        str(path)
        for folder in folders
        for path in folder.glob("*")
        if not path.name.endswith(".lock")
    ]


def test_another_host_boots_what_was_built_here(
    exported: Path, project: Path, own_state: Path
) -> None:
    store = Store(own_state)
    done = sharing.import_image(exported, store, lambda _: None)
    assert (done.facts.name, done.templates) == ("app", 1)

    builder = ImageBuilder(project=project, progress=lambda line: pytest.fail(line))
    image = builder.build("app")
    assert image[1].parent.name == done.image.name
    with SmolVM(config_of(image)) as vm:
        assert vm.restored, "its guest had booted on the other host"
        assert vm.run("cat /built").stdout == "built\nagain\n"
        # A person can get in, too, with the key that came along.
        line = f"{vm.ssh_commands()['ssh']} cat /built"
        said = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60)  # noqa: S602
        assert said.stdout == "built\nagain\n", said.stderr
    with SmolVM(config_of(image), restore=False) as vm:
        assert vm.run("cat /built").stdout == "built\nagain\n"
    listed = json.loads(cli("image", "list", "--json").stdout)
    assert [entry["name"] for entry in listed] == ["app"]
    own = (own_state / "keys/id_ed25519.pub").read_text().split()[1]
    assert own not in (image[1].parent / f"{image[1].name}.smolvm.json").read_text()
    modes = {path.stat().st_mode & 0o777 for path in (own_state / "keys/imported").iterdir()}
    assert modes == {0o600}

    # It is there already: nothing changes.
    assert sharing.import_image(exported, store, lambda _: None).image == done.image
    # Once it is removed it stands for nothing.
    cli("image", "rm", "app")
    with pytest.raises(ImageError, match="'micro' has not been built"):
        ImageBuilder(project=project, make_missing=False).build("app")


def test_another_recipe_is_not_what_was_imported(
    exported: Path, own_state: Path, tmp_path: Path
) -> None:
    sharing.import_image(exported, Store(own_state), lambda _: None)
    other = tmp_path / "pyproject.toml"
    other.write_text(RECIPE.replace("again", "otherwise"))
    with pytest.raises(ImageError, match="'micro' has not been built"):
        ImageBuilder(project=other, make_missing=False).build("app")
    other.write_text(RECIPE)
    assert ImageBuilder(project=other, make_missing=False).build("app")


def test_the_archive_tells_no_secrets_of_tests(exported: Path) -> None:
    with (
        exported.open("rb") as file,
        zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as plain,
        tarfile.open(fileobj=plain, mode="r|") as tar,
    ):
        first = tar.next()
        assert first is not None
        data = tar.extractfile(first)
        assert data is not None
        contents = json.loads(data.read())
    (facts,) = contents["templates"].values()
    assert facts["config"]["env_vars"] == {}
    assert facts["ssh_key_path"] is None
    assert "digests.json" not in str(contents["files"])


def drop(name: str) -> Callable[[Members], Members]:
    return lambda members: [entry for entry in members if entry[0] != name]


def add(name: str) -> Callable[[Members], Members]:
    return lambda members: [*members, (name, b"more")]


def told(change: Callable[[dict[str, object]], object]) -> Callable[[Members], Members]:
    """The same members, of which the manifest tells something else."""

    def changed(members: Members) -> Members:
        manifest = json.loads(members[0][1])
        change(manifest)
        return [("manifest.json", json.dumps(manifest).encode()), *members[1:]]

    return changed


def file_called(name: str) -> Callable[[Members], Members]:
    facts = {"size": 4, "sha256": hashlib.sha256(b"more").hexdigest(), "data_bytes": 4}
    return lambda members: add(name)(told(lambda m: m["files"].update({name: facts}))(members))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("image/vmlinux"), "it lacks image/vmlinux"),
        (add("image/more"), "its manifest does not tell of 'image/more'"),
        (add("../outside"), "its manifest does not tell of '../outside'"),
        (file_called("../outside"), "is no name for a file in it"),
        (file_called("image/../../outside"), "is no name for a file in it"),
        (file_called("image/.hidden"), "is no name for a file in it"),
        (lambda members: members[1:], "is no archive of an image"),
        (
            lambda members: [
                (n, d if i != 2 else d[:-1] + b"?") for i, (n, d) in enumerate(members)
            ],
            "has another SHA-256 than its manifest says",
        ),
        (told(lambda m: m.update(format=99)), "is in format 99, and this release"),
        (told(lambda m: m.update(image="../../x")), "its manifest cannot be read"),
        (told(lambda m: m.pop("facts")), "its manifest cannot be read"),
        (told(lambda m: m["facts"].update(recipe="")), "does not say what its image was made of"),  # type: ignore[attr-defined]
        (told(lambda m: m.update(public_key="nothing")), "not a public key in OpenSSH's format"),
        (
            told(lambda m: m["files"]["image/vmlinux"].update(data_bytes=1 << 60)),  # type: ignore[index]
            "needs some .* MiB, and",
        ),
        # Small files, so no disk in it is one.
        (lambda members: members, "is refused: its disk .* or is no qcow2 disk"),
    ],
)
def test_what_is_not_what_it_says_is_refused(
    small: tuple[Path, Members],
    own_state: Path,
    change: Callable[[Members], Members],
    message: str,
) -> None:
    path, members = small
    if "no qcow2 disk" in message:
        spoilt = [(name, b"spoilt" if name.endswith(".qcow2") else d) for name, d in members]
        members = told(
            lambda m: [
                facts.update(size=6, sha256=hashlib.sha256(b"spoilt").hexdigest())
                for name, facts in m["files"].items()  # type: ignore[attr-defined]
                if name.endswith(".qcow2")
            ]
        )(spoilt)
    write(path, change(members))
    with pytest.raises(ImageError, match=message):
        sharing.import_image(path, Store(own_state), lambda _: None)
    assert left(own_state) == []


@pytest.mark.parametrize("at", [0, 0.5, -100])
def test_a_damaged_archive_is_refused(
    exported: Path, own_state: Path, tmp_path: Path, at: float
) -> None:
    data = bytearray(exported.read_bytes())
    position = int(len(data) * at) if isinstance(at, float) else at
    path = tmp_path / "damaged.smolvm"
    for broken in (
        bytes(data[:position]),
        bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position:][1:]),
    ):
        path.write_bytes(broken)
        with pytest.raises(ImageError, match=r"damaged|no archive of an image"):
            sharing.import_image(path, Store(own_state), lambda _: None)
        assert left(own_state) == []


def test_what_is_no_archive_is_refused(own_state: Path, tmp_path: Path) -> None:
    for content in (b"", b"text", bytes(5000), zstandard.compress(b"text" * 999)):
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(ImageError, match=r"damaged|no archive of an image"):
            sharing.import_image(path, Store(own_state), lambda _: None)
    with pytest.raises(ImageError, match="No such file"):
        sharing.import_image(tmp_path / "nothing", Store(own_state), lambda _: None)
    with pytest.raises(ImageError, match="Is a directory"):
        sharing.import_image(tmp_path, Store(own_state), lambda _: None)
    assert left(own_state) == []


def test_a_file_of_the_users_is_not_overwritten(
    micro: tuple[Path, Path], state_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "notes.txt"
    target.write_text("mine")
    with pytest.raises(ImageError, match="is no archive of an image: give another name"):
        sharing.export_image(micro[1], target, Store(), lambda _: None)
    assert target.read_text() == "mine"
    nowhere = tmp_path / "nowhere" / "micro.smolvm"
    with pytest.raises(ImageError, match="cannot be written: No such file"):
        sharing.export_image(micro[1], nowhere, Store(), lambda _: None, templates=False)
    target.unlink()
    for _ in range(2):  # an archive of before is replaced
        done = sharing.export_image(micro[1], target, Store(), lambda _: None, templates=False)
        assert done.templates == 0
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_command_exports_and_imports(
    micro: tuple[Path, Path], state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = cli("image", "export", "micro", "--no-templates").stdout
    assert said == f"micro.smolvm: {micro[1].parent.name}, with 0 booted\n"
    key = micro[1].parent.name
    cli("image", "export", key, "--no-templates", "--output", "other.smolvm")
    monkeypatch.setenv("SMOLVM_STATE_DIR", str(tmp_path / "other"))
    assert cli("image", "import", "micro.smolvm").stdout == f"micro: {key}, with 0 booted\n"
    assert ImageBuilder(make_missing=False).build("micro")[1].parent.name == key
    assert "no archive" in cli("image", "import", "/etc/passwd", expected=1).stderr
