"""Whatever is written into markers, ini files, recipes, records and the guest's environment file.

Each is understood, or refused with the error of its kind; nothing else ever comes out.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pytest_smolvm import VMConfig, envvars
from pytest_smolvm.disks import image_format
from pytest_smolvm.errors import ImageError
from pytest_smolvm.images.manifest import manifest_path, read_manifest
from pytest_smolvm.images.recipes import Recipe, read_recipes
from pytest_smolvm.images.shelf import shelf
from pytest_smolvm.plugin.options import MARKER_ARGUMENTS, OPTIONS, Option
from pytest_smolvm.plugin.settings import _check, _path_from
from pytest_smolvm.plugin.wanted import Wanted, WrongMarkerError, apply
from pytest_smolvm.records import RECORD_NAME, is_kept
from pytest_smolvm.store import Store
from pytest_smolvm.templates import TemplateError, Templates

EXAMPLES = int(os.environ.get("SMOLVM_TEST_EXAMPLES", "100"))

# One file for all examples: each writes it anew. And no deadline: machines are shared. The examples
# are the same each time, unless more are asked for.
fuzz = settings(
    max_examples=EXAMPLES,
    derandomize="SMOLVM_TEST_EXAMPLES" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

_DEEP = b"[" * 5000

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(
        ["auto", "qemu", "~", "~nobody-here/x", "\0", "/", "", "a/" * 3000, "1e400", 10**400]
    )
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)
OBJECTS = JSON | st.binary() | st.tuples(SCALARS) | st.frozensets(st.integers()) | st.just(object())


@fuzz
@given(arguments=st.dictionaries(st.sampled_from(MARKER_ARGUMENTS) | st.text(), OBJECTS))
def test_a_marker(plain_files: dict[str, Path], arguments: dict[str, Any]) -> None:
    try:
        wanted = apply(arguments, Wanted(), "@pytest.mark.smolvm")
        VMConfig(**{**plain_files, **wanted.config_fields})
    except WrongMarkerError as error:
        assert "@pytest.mark.smolvm" in str(error)
    except ValidationError:
        pass
    else:
        assert set(arguments) <= set(MARKER_ARGUMENTS)


@fuzz
@given(
    option=st.sampled_from(OPTIONS),
    text=st.text() | st.sampled_from(["~nobody-here/x", "\0", "a/" * 3000, "1e400", "9" * 5000]),
)
def test_an_ini_value_or_an_option(option: Option, text: str) -> None:
    value = text.splitlines() if option.ini_type == "linelist" else text
    try:
        _check(option, "it", _path_from(Path("/somewhere"), value, option))
    except pytest.UsageError as error:
        assert str(error).startswith("it = ")


def as_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {as_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return json.dumps("" if value is None else value)


TABLES = st.dictionaries(
    st.sampled_from(list(Recipe.model_fields)) | st.text(),
    st.sampled_from(["micro", ".", "web", ["curl"], {".": "/x"}]) | JSON,
)


@fuzz
@given(tables=st.dictionaries(st.sampled_from(["web", "micro", "b"]) | st.text(), TABLES | JSON))
def test_a_recipe(tmp_path: Path, tables: dict[str, Any]) -> None:
    project = tmp_path / "pyproject.toml"
    text = f"[tool.smolvm]\nimages = {as_toml(tables)}\n"
    project.write_bytes(text.encode(errors="surrogatepass"))
    try:
        recipes = read_recipes(project)
    except ImageError as error:
        assert str(project) in error.message
    else:
        assert set(recipes.by_name) == set(tables)


@fuzz
@given(data=st.binary() | st.sampled_from([b"x=" + _DEEP, b"tool=1", b"[tool]\nsmolvm=[]"]))
def test_a_project_of_any_bytes(tmp_path: Path, data: bytes) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_bytes(data)
    try:
        assert read_recipes(project).by_name == {}
    except ImageError as error:
        assert str(project) in error.message


DOCUMENTS = (
    st.binary()
    | st.sampled_from([_DEEP, b"{}", b"null", b'{"a":1e999}'])
    | JSON.map(lambda value: json.dumps(value).encode())
)


@fuzz
@given(data=DOCUMENTS)
def test_an_image_manifest(tmp_path: Path, data: bytes) -> None:
    rootfs = tmp_path / "rootfs.ext4"
    rootfs.touch()
    manifest_path(rootfs).write_bytes(data)
    try:
        read_manifest(rootfs)
    except ImageError as error:
        assert str(manifest_path(rootfs)) in error.message


def _facts_of_an_image(state: Path) -> Path:
    image = state / "images" / "one-0123"
    image.mkdir(parents=True, exist_ok=True)
    (image / "rootfs.ext4").touch()
    return image / "image.json"


def _look_at_the_shelf(state: Path) -> None:
    assert len(shelf(state / "images", Store(state))) == 1


def _facts_of_a_template(state: Path) -> Path:
    (state / "templates" / "t").mkdir(parents=True, exist_ok=True)
    return state / "templates" / "t" / "template.json"


def _look_for_the_template(state: Path) -> None:
    with pytest.raises(TemplateError):
        Templates(Store(state)).find("t")


def _record_of_a_vm(state: Path) -> Path:
    directory = state / "vms" / "vm-1"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "disk.qcow2").touch()
    return directory / RECORD_NAME


def _sweep(state: Path) -> None:
    """A disk whose record is not understood is never taken for rubbish."""
    assert is_kept(state / "vms" / "vm-1")
    assert Store(state).sweep() == []


@pytest.mark.parametrize(
    ("place", "look"),
    [
        (_facts_of_an_image, _look_at_the_shelf),
        (_facts_of_a_template, _look_for_the_template),
        (_record_of_a_vm, _sweep),
    ],
)
@fuzz
@given(data=DOCUMENTS)
def test_what_we_keep_beside_our_files(
    own_state: Path, place: Callable[[Path], Path], look: Callable[[Path], None], data: bytes
) -> None:
    own_state.mkdir(mode=0o700, exist_ok=True)
    place(own_state).write_bytes(data)
    look(own_state)


@fuzz
@given(data=st.binary(max_size=200), magic=st.sampled_from([b"", b"QFI\xfb", b"QFI\xfb\0\0\0\3"]))
def test_a_disk_of_any_bytes(tmp_path: Path, data: bytes, magic: bytes) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(magic + data)
    try:
        assert image_format(disk) in ("raw", "qcow2")
    except ImageError as error:
        assert str(disk) in error.message


NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,9}", fullmatch=True)
VALUES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@fuzz
@given(variables=st.dictionaries(NAMES, VALUES))
def test_an_environment_file_is_read_as_it_was_written(variables: dict[str, str]) -> None:
    assert envvars.parse(envvars.render(variables)) == variables


@settings(fuzz, max_examples=30)
@given(value=VALUES)
def test_a_shell_reads_the_environment_file_as_we_do(tmp_path: Path, value: str) -> None:
    file = tmp_path / "env.sh"
    file.write_bytes(envvars.render({"SMOLVM_FUZZ": value}).encode())
    done = subprocess.run(
        ["sh", "-c", '. "$0"; printf %s "$SMOLVM_FUZZ"', file], capture_output=True, check=True
    )
    assert done.stdout.decode() == value


@fuzz
@given(text=st.text(st.sampled_from("export A='\"\n=#\\ x")) | st.text())
def test_an_environment_file_that_somebody_else_wrote(text: str) -> None:
    for key, value in envvars.parse(text).items():
        assert f"export {key}=" in text
        assert isinstance(value, str)
