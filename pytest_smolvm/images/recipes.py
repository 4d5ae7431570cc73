"""Recipes: what a user's image is made of, as told in a project's ``pyproject.toml``.

::

    [tool.smolvm.images.web]
    base = "debian"
    packages = ["nginx"]
    files = { "tests/site" = "/var/www/html" }
    run = ["nginx -t"]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pytest_smolvm.errors import ImageError
from pytest_smolvm.images.projects import PYPROJECT, recipe_tables
from pytest_smolvm.limits import IMAGES
from pytest_smolvm.paths import exists, expanded

NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._:=~<>@-]*")


class Recipe(BaseModel):
    """One table ``[tool.smolvm.images.NAME]``; paths are relative to its file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str | None = None
    """The image that it begins with: a built-in one, or another recipe."""
    rootfs: Path | None = None
    """Instead of ``base``: a root file system, as for ``ImageBuilder.from_rootfs``."""
    kernel: Path | None = None
    """The kernel to boot with ``rootfs``; None: the root file system's own, or ``micro``'s."""
    rootfs_size_mb: Annotated[int, Field(ge=32, le=1 << 20)] | None = None
    """The size in MiB of the disk made of ``rootfs``."""
    arch: Literal["x86_64", "aarch64"] | None = None
    """The processor that it is for; None: what the base is for, or this host's."""
    packages: list[str] = []
    """What the guest's package manager (apt-get, apk or dnf) installs."""
    files: dict[str, str] = {}
    """What is copied into the guest, files and trees: paths here, paths there."""
    run: list[str] = []
    """Commands that are run in the guest, by its shell, one after the other."""

    @field_validator("packages")
    @classmethod
    def _check_packages(cls, value: list[str]) -> list[str]:
        for name in value:
            if not _PACKAGE.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a package")
        return value

    @field_validator("files")
    @classmethod
    def _check_files(cls, value: dict[str, str]) -> dict[str, str]:
        for there in value.values():
            if not there.startswith("/"):
                raise ValueError(f"{there!r} is not an absolute path of the guest")
        return value

    @model_validator(mode="after")
    def _check_beginning(self) -> Recipe:
        if (self.base is None) == (self.rootfs is None):
            raise ValueError("say what it begins with: either base, an image, or rootfs, a path")
        if self.rootfs is None and (self.kernel or self.rootfs_size_mb):
            raise ValueError("kernel and rootfs_size_mb go with rootfs, not with base")
        return self


@dataclass(frozen=True)
class Recipes:
    """The recipes of one project, each of them sound, and none without an end."""

    source: Path
    by_name: Mapping[str, Recipe]

    @property
    def names(self) -> list[str]:
        """All images that can be asked for by name: built-in ones first."""
        return [*IMAGES, *sorted(self.by_name)]

    def path(self, given: str | Path) -> Path:
        """A path of a recipe, from where it was written."""
        return self.source.parent / expanded(given)


def read_recipes(source: Path | None) -> Recipes:
    """The recipes in a ``pyproject.toml``; None: there are none. Raises ``ImageError``."""
    if source is None:
        return Recipes(Path.cwd() / PYPROJECT, {})
    tables = recipe_tables(source)
    recipes: dict[str, Recipe] = {}
    for name, table in tables.items():
        where = _table(name, source)
        if not NAME.fullmatch(name):
            raise ImageError(
                f"{where}: {name!r} is no name for an image: use lowercase letters, digits, dots, "
                "hyphens and underscores"
            )
        if name in IMAGES:
            raise ImageError(f"{where}: {name!r} is a built-in image: choose another name")
        try:
            recipes[name] = Recipe.model_validate(table)
        except ValidationError as error:
            raise ImageError(f"{where}: {_explain(error)}", {"name": name}) from None
    found = Recipes(source, recipes)
    for name in recipes:
        _check(name, found)
    return found


def _check(name: str, recipes: Recipes) -> None:
    recipe = recipes.by_name[name]
    where = _table(name, recipes.source)
    for what in [recipe.rootfs, recipe.kernel, *recipe.files]:
        if what is not None and not exists(recipes.path(what)):
            raise ImageError(
                f"{where}: {str(what)!r} does not exist ({recipes.path(what)}); paths are relative "
                f"to {recipes.source.parent}",
                {"name": name, "path": str(what)},
            )
    way = [name]
    while (base := recipes.by_name[way[-1]].base) is not None and base not in IMAGES:
        if base in way:
            way_round = " is based on ".join([*way, base])
            raise ImageError(f"{where} has no beginning: {way_round}", {"name": name})
        if base not in recipes.by_name:
            raise ImageError(
                f"{_table(way[-1], recipes.source)}: there is no image {base!r} to begin with: use "
                f"one of {', '.join(recipes.names)}",
                {"name": name, "base": base},
            )
        way.append(base)


def _table(name: str, source: Path) -> str:
    return f"[tool.smolvm.images.{name}] of {source}"


def _explain(error: ValidationError) -> str:
    """What is wrong, a key at a time, and what would be right."""
    problems = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            text = f"there is no key {key!r}: the keys are {', '.join(Recipe.model_fields)}"
        else:
            text = problem["msg"].removeprefix("Value error, ")
            text = f"{key} = {problem['input']!r}: {text}" if key else text
        problems.append(text)
    return "; ".join(problems)
