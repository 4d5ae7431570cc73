"""Recipes in pyproject.toml: what is wrong with one is said, with the table and the way to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_smolvm.errors import ImageError
from pytest_smolvm.images.projects import find_project
from pytest_smolvm.images.recipes import read_recipes
from pytest_smolvm.limits import IMAGES


def project(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pyproject.toml"
    path.write_text(text)
    return path


def test_a_recipe_is_read_with_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    source = project(
        tmp_path,
        """
        [tool.smolvm.images.web]
        base = "debian"
        packages = ["nginx", "libc6:amd64", "nodejs=20.1+dfsg-1~deb12u1"]
        files = { "site" = "/var/www/html" }
        run = ["nginx -t"]
        [tool.smolvm.images.web-dev]
        base = "web"
        """,
    )
    recipes = read_recipes(source)
    assert recipes.names == [*IMAGES, "web", "web-dev"]
    web = recipes.by_name["web"]
    assert web.files == {"site": "/var/www/html"}
    assert recipes.path("site") == tmp_path / "site"
    assert recipes.by_name["web-dev"].packages == []


def test_a_project_without_recipes_has_the_built_in_images(tmp_path: Path) -> None:
    assert read_recipes(project(tmp_path, "[project]\nname = 'x'")).names == list(IMAGES)
    assert read_recipes(None).names == list(IMAGES)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("base = 'debian'\npackges = ['x']", "there is no key 'packges': the keys are base, "),
        ("packages = ['x']", "say what it begins with: either base"),
        ("base = 'debian'\nrootfs = 'x'", "say what it begins with: either base"),
        ("base = 'debian'\nkernel = 'vmlinux'", "kernel and rootfs_size_mb go with rootfs"),
        ("base = 'nope'", "there is no image 'nope' to begin with: use one of micro, "),
        ("base = 'web'", "has no beginning: web is based on web"),
        ("base = 'debian'\npackages = ['a b']", "'a b' is no name of a package"),
        ("base = 'debian'\npackages = ['-o=x']", "'-o=x' is no name of a package"),
        ("base = 'debian'\npackages = 'nginx'", "packages = 'nginx': Input should be a valid list"),
        ("base = 'debian'\nrun = [1]", "run.0 = 1: "),
        ("base = 'debian'\nfiles = { 'a' = 'b' }", "'b' is not an absolute path of the guest"),
        ("base = 'debian'\nfiles = { 'missing' = '/b' }", "'missing' does not exist ("),
        ("base = 'micro'\narch = 'arm64'", "arch = 'arm64': Input should be 'x86_64' or 'aarch64'"),
        ("rootfs = 'missing.tar'", "'missing.tar' does not exist ("),
        ("rootfs = 'x'\nrootfs_size_mb = 1", "rootfs_size_mb = 1: "),
    ],
)
def test_what_is_wrong_is_named_with_its_table(tmp_path: Path, text: str, named: str) -> None:
    source = project(tmp_path, f"[tool.smolvm.images.web]\n{text}")
    with pytest.raises(ImageError) as caught:
        read_recipes(source)
    assert f"[tool.smolvm.images.web] of {source}" in str(caught.value)
    assert named in str(caught.value)


def test_recipes_that_go_in_a_circle_are_shown_as_one(tmp_path: Path) -> None:
    text = "\n".join(
        f"[tool.smolvm.images.{name}]\nbase = '{base}'" for name, base in ("ab", "bc", "ca")
    )
    with pytest.raises(ImageError, match="a is based on b is based on c is based on a"):
        read_recipes(project(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[tool.smolvm.images.micro]\nbase = 'debian'", "'micro' is a built-in image"),
        ("[tool.smolvm.images.'My Image']\nbase = 'debian'", "'My Image' is no name"),
        ("[tool.smolvm]\nimages = 3", "must be a table of tables"),
        ("[tool.smolvm.images]\nweb = 3", "[tool.smolvm.images.web]"),
        ("tool = [", "cannot be read"),
    ],
)
def test_a_file_that_makes_no_sense_is_named(tmp_path: Path, text: str, named: str) -> None:
    source = project(tmp_path, text)
    with pytest.raises(ImageError) as caught:
        read_recipes(source)
    assert str(source) in str(caught.value)
    assert named in str(caught.value)


def test_a_project_is_found_from_within_it(tmp_path: Path) -> None:
    source = project(tmp_path, "")
    inner = tmp_path / "a/b"
    inner.mkdir(parents=True)
    assert find_project(inner) == source
