"""ImageBuilder: images by name, built in or a project's own, and from root file systems."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from pytest_smolvm import provisioning, rawdisks
from pytest_smolvm.disks import chain_of, disk_size, image_format
from pytest_smolvm.errors import ImageError
from pytest_smolvm.images.builder import DistributionBuilder, with_companion
from pytest_smolvm.images.cache import Progress, check_space, facts_of, recipe_key
from pytest_smolvm.images.kernel import kernel_architecture
from pytest_smolvm.images.manifest import read_manifest, write_manifest
from pytest_smolvm.images.recipes import Recipe, Recipes, read_recipes
from pytest_smolvm.limits import IMAGES, host_architecture
from pytest_smolvm.provisioning import Step
from pytest_smolvm.statedir import locked, make_private_dir

_FLAT = "flat.ext4"
_ROOM_BYTES = 1 << 30
_FORMAT = 1  # raised whenever the same step would make another layer


class ImageBuilder(DistributionBuilder):
    """Builds images and keeps them in ``cache_dir`` (default: ``images`` in the state dir).

    ``progress`` is called with a line of text at each step of a build (default:
    print it on standard error); an image that is there already says nothing.
    ``make_missing``: whether an image that is not there is made; False: it is an ``ImageError``.
    ``project``: the ``pyproject.toml`` with recipes of the project's own, in its tables
    ``[tool.smolvm.images.NAME]``; None: there are none. ``on_output`` is called with what a
    recipe's commands print, as it comes (bytes); all of it is kept in a log, too.
    ``keep_failed``: whether the VM of a recipe whose step failed is kept, to be looked into.
    """

    def __init__(
        self,
        cache_dir: Path | str | None = None,
        *,
        progress: Progress | None = None,
        make_missing: bool = True,
        project: Path | str | None = None,
        on_output: Callable[[bytes], object] = bytes,
        keep_failed: bool = False,
    ) -> None:
        super().__init__(cache_dir, progress=progress, make_missing=make_missing)
        self._project = Path(project) if project is not None else None
        self._on_output = on_output
        self._keep_failed = keep_failed

    def build(self, name: str, *, arch: str | None = None) -> tuple[Path, Path]:
        """The image called ``name``, built in or by a recipe: kernel and root disk.

        ``arch``: ``x86_64`` or ``aarch64``, where the image can be had for either; None: what its
        recipe says, or this host's. Raises ``ImageError``.
        """
        if name in IMAGES:
            return self._build_stock(name, arch)
        recipes = read_recipes(self._project)
        if name not in recipes.by_name:
            raise ImageError(
                f"there is no image called {name!r}: the images are {', '.join(recipes.names)}; "
                "your own are told of in [tool.smolvm.images.NAME] of pyproject.toml, and a kernel "
                "and a root disk are given by path",
                {"name": name, "known": recipes.names},
            )
        return self._build_recipe(name, recipes, arch)

    def flatten(self, rootfs: Path) -> Path:
        """One raw file with all that an image of layers holds, for whoever wants that.

        It lies beside ``rootfs``, and is made once. Raises ``ImageError``.
        """
        if len(chain_of(rootfs)) == 1 and image_format(rootfs) == "raw":
            return rootfs
        flat = rootfs.with_name(_FLAT)
        with (
            self._building(rootfs.parent.name) as say,
            locked(
                self.cache_dir / f"{rootfs.parent.name}.flat.lock",
                operation="waiting for another process to flatten an image",
                timeout_s=provisioning.STEP_TIMEOUT_S,
            ),
        ):
            if not flat.exists():
                say("making one file of its layers")
                manifest = read_manifest(rootfs)
                assert manifest is not None  # noqa: S101 - every image has one
                write_manifest(flat, manifest)
                rawdisks.flatten(rootfs, flat)
        return flat

    def _build_recipe(self, name: str, recipes: Recipes, arch: str | None) -> tuple[Path, Path]:
        recipe = recipes.by_name[name]
        arch = arch or recipe.arch
        with self._building(name):
            wanted = self._wanted(name, recipes, arch)
            if imported := self._find_imported(name, wanted[-1]):
                return imported
        if recipe.base is None:
            image = self.from_rootfs(
                *_rootfs_of(recipe, recipes),
                name=name,
                rootfs_size_mb=recipe.rootfs_size_mb,
                arch=arch,
            )
        elif recipe.base in recipes.by_name:
            image = self._build_recipe(recipe.base, recipes, arch)
        else:
            image = self._build_stock(recipe.base, arch)
        for step, asked in zip(_steps(recipe, recipes), wanted[1:], strict=True):
            image = self._add_layer(name, image, step, asked)
        return image

    def _wanted(self, name: str, recipes: Recipes, arch: str | None) -> list[Mapping[str, object]]:
        """What is asked for by a recipe of a project: below it, and after each of its steps."""
        recipe = recipes.by_name[name]
        arch = arch or recipe.arch
        if recipe.base is None:
            source, kernel = _rootfs_of(recipe, recipes)
            root = self._rootfs_recipe(source, kernel, recipe.rootfs_size_mb)
            wanted: list[Mapping[str, object]] = [
                with_companion(root, arch or host_architecture(), None)
            ]
        elif recipe.base in recipes.by_name:
            wanted = [self._wanted(recipe.base, recipes, arch)[-1]]
        else:
            wanted = [self._stock_recipe(recipe.base, arch)]
        for step in _steps(recipe, recipes):
            over = recipe_key(wanted[-1])
            wanted.append({"format": _FORMAT, "over": over, "step": step.inputs})
        return wanted

    def _add_layer(
        self,
        name: str,
        parent: tuple[Path, Path],
        step: Step,
        asked: Mapping[str, object],
    ) -> tuple[Path, Path]:
        below = parent[1].parent.name
        inputs = {"format": _FORMAT, "over": below, "step": step.inputs}
        with self._building(name) as say:

            def build(target: Path, work: Path) -> None:
                room = min(disk_size(parent[1]), _ROOM_BYTES)
                check_space(work, room, f"building the image {name!r}")
                logs = make_private_dir(self.cache_dir / "logs")
                log = logs / f"{name}.log"
                log.unlink(missing_ok=True)
                provisioning.provision(
                    parent,
                    step,
                    name,
                    target,
                    log,
                    say,
                    self._on_output,
                    keep_failed=self._keep_failed,
                )
                log.unlink()  # the image has it

            architecture = kernel_architecture(parent[0]) or host_architecture()
            facts = facts_of(name, architecture, f"{below}, then {step.title}", asked)
            return self._get(name, inputs, facts, build, say)


def _rootfs_of(recipe: Recipe, recipes: Recipes) -> tuple[Path, Path | None]:
    assert recipe.rootfs is not None  # noqa: S101 - validated
    return recipes.path(recipe.rootfs), recipes.path(recipe.kernel) if recipe.kernel else None


def _steps(recipe: Recipe, recipes: Recipes) -> list[Step]:
    """What a recipe does in a guest, in order; each a layer, so that a later one changes alone."""
    steps = []
    if recipe.packages:
        steps.append(provisioning.install(recipe.packages))
    if recipe.files:
        files = tuple((recipes.path(here), there) for here, there in recipe.files.items())
        inputs = ["files", *([_digest(here), there] for here, there in files)]
        steps.append(Step(f"copying {', '.join(recipe.files)}", inputs, files=files))
    steps += [Step(f"running {line}", ["run", line], command=line) for line in recipe.run]
    return steps


_digests: dict[tuple[object, ...], str] = {}
"""What has been read before, by the times and sizes that files had then."""


def _digest(path: Path) -> str:
    """Changes with the contents, names and modes of what lies at ``path``."""
    entries = [path, *sorted(path.rglob("*"))]
    seen: list[object] = []
    for entry in entries:
        facts = entry.lstat()
        seen += (entry, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    known = tuple(seen)
    if known not in _digests:
        _digests[known] = _read_digest(path, entries)
    return _digests[known]


def _read_digest(path: Path, entries: list[Path]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        mode = entry.lstat().st_mode
        digest.update(f"{entry.relative_to(path)}\0{mode:o}\0".encode("utf-8", "surrogateescape"))
        if entry.is_symlink():
            digest.update(str(entry.readlink()).encode("utf-8", "surrogateescape"))
        elif entry.is_file():
            with entry.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
