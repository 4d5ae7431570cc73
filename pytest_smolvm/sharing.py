"""Images for other machines: written into one file with guests of it that have booted, and read.

What is read stands for its recipe from then on, whatever versions of packages the host itself
would have taken; its guests let in the key that came with it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from pytest_smolvm.config import SSH_BOOT_ARGS, VMConfig
from pytest_smolvm.disks import DIGESTS, chain_of, note_digests, noted_digests
from pytest_smolvm.errors import ImageError, SmolVMError
from pytest_smolvm.images import archive
from pytest_smolvm.images.archive import Contents
from pytest_smolvm.images.builder import paths_in
from pytest_smolvm.images.cache import FACTS, ImageCache, ImageFacts, Progress, put_in_place
from pytest_smolvm.images.manifest import read_manifest
from pytest_smolvm.keys import (
    check_public_key,
    import_key_pair,
    key_pair_for,
    key_pairs,
    same_key,
)
from pytest_smolvm.qcow2 import MAGIC, read_header
from pytest_smolvm.statedir import locked, read_json, try_lock, write_json
from pytest_smolvm.store import Store
from pytest_smolvm.templates import Template, TemplateFacts, Templates
from pytest_smolvm.vm import SmolVM
from pytest_smolvm.vmdisk import stat_image

_LOCK_TIMEOUT_S = 600.0
_SCRATCH = "import"
_HEADER_BYTES = 104
_DERIVED = ("flat.ext4",)  # made anew of the rest where it is wanted


@dataclass(frozen=True)
class Shared:
    """What was written, or read."""

    image: Path
    """The image's directory."""
    facts: ImageFacts
    templates: int
    """How many booted guests went with it."""


def export_image(
    rootfs: Path, target: Path, store: Store, say: Progress, *, templates: bool = True
) -> Shared:
    """Write the image with the root disk ``rootfs`` as the file ``target``.

    ``templates``: whether guests that have booted go with it; if there is none yet one is booted,
    as a test without any settings would have it. An archive of before is replaced. Raises
    ``ImageError``.
    """
    image = rootfs.parent
    if target.exists() and not archive.is_archive(target):
        raise ImageError(f"{target} is there, and is no archive of an image: give another name")
    facts = _facts_of(image)
    if not facts.recipe:
        raise ImageError(
            f"the image {image.name} was made by an earlier release, which did not write down of "
            f"what: remove it and build it anew (pytest-smolvm image rm {image.name})"
        )
    found = _templates_of(rootfs, store, say) if templates else []
    contents, sources = _collect(rootfs, facts, found, store)
    lock = try_lock(image.with_name(f"{image.name}.lock"))
    if lock is None:
        raise ImageError(f"the image {image.name} is being built right now: try again later")
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        say(f"writing {target}")
        archive.write(scratch, contents, sources)
        scratch.replace(target)
    except OSError as error:
        raise ImageError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        scratch.unlink(missing_ok=True)
        lock.release()
    return Shared(image, facts, len(found))


def import_image(path: Path, store: Store, say: Progress) -> Shared:
    """Read what ``export_image`` wrote; from now on it is what is found for its recipe.

    Raises ``ImageError``; nothing of the file is used then.
    """
    cache = ImageCache(store.images)
    cache.sweep()
    with (
        locked(
            store.images / f"{_SCRATCH}.lock",
            operation="waiting for another process to import an image",
            timeout_s=_LOCK_TIMEOUT_S,
            on_wait=lambda: say("another process imports one: waiting"),
        ),
        tempfile.TemporaryDirectory(dir=store.images, prefix=f".{_SCRATCH}.") as folder,
    ):
        scratch = Path(folder)
        say(f"reading {path}")
        contents = archive.read(path, scratch)
        _check_image(contents, scratch / "image", path)
        _take_key(contents, scratch / "key", store, path)
        image = _take_image(contents, scratch / "image", store)
        taken = _take_templates(contents, scratch / "templates", image, store)
        cache.adopt(image)
    return Shared(image, contents.facts, taken)


# -- writing ---------------------------------------------------------------------


def _facts_of(image: Path) -> ImageFacts:
    try:
        return ImageFacts.model_validate(read_json(image / FACTS))
    except ValidationError as error:
        raise ImageError(f"{image} is no image that ImageBuilder made") from error


def _templates_of(rootfs: Path, store: Store, say: Progress) -> list[Template]:
    """Guests of the image that have booted, and in which nothing has happened since."""
    found = _fresh_templates(rootfs, store)
    if found:
        return found
    say("booting a guest of it, which goes with it")
    kernel, _ = paths_in(rootfs.parent)
    config = VMConfig(kernel_path=kernel, rootfs_path=rootfs, boot_args=SSH_BOOT_ARGS)
    with SmolVM(config):
        pass
    found = _fresh_templates(rootfs, store)
    if not found:
        say("its state cannot be kept: the image goes alone")
    return found


def _fresh_templates(rootfs: Path, store: Store) -> list[Template]:
    templates = Templates(store)
    found = []
    for path in sorted(templates.root.glob("[0-9a-f]*/")):
        try:
            template = templates.find(path.name)
        except SmolVMError:
            continue  # whoever wants to start from it removes it
        if template is not None and template.facts.fresh:
            disk = Path(str(template.facts.disk[0]))
            if disk.exists() and disk.samefile(rootfs):
                found.append(template)
    return found


def _collect(
    rootfs: Path, facts: ImageFacts, templates: list[Template], store: Store
) -> tuple[Contents, dict[str, Path]]:
    image = rootfs.parent
    sources = {
        f"image/{path.name}": path
        for path in sorted(image.iterdir())
        if path.is_file()
        and path.name not in (FACTS, DIGESTS)
        and not path.name.startswith((".", *_DERIVED))
    }
    told: dict[str, dict[str, object]] = {}
    for template in templates:
        for name in template.facts.files:
            sources[f"templates/{template.key}/{name}"] = template.path / name
        # What it was for is nobody's business, and may hold secrets.
        config = {**template.facts.config, "env_vars": {}}
        changed = template.facts.model_copy(update={"config": config, "ssh_key_path": None})
        told[template.key] = changed.model_dump(mode="json", exclude={"files"})
    manifest = read_manifest(rootfs)
    authorized = manifest.authorized_keys if manifest else []
    pair = key_pair_for(store, authorized)
    is_ours = any(same_key(pair.public_key, line) for line in authorized)
    if is_ours:
        sources["key"] = pair.private_path
    known = noted_digests(image)
    contents = Contents(
        format=archive.FORMAT,
        image=image.name,
        facts=facts,
        public_key=pair.public_key if is_ours else "",
        templates=told,
        files={
            name: archive.describe(
                path, _known_digest(path, known) if path.parent == image else None
            )
            for name, path in sources.items()
        },
    )
    return contents, sources


def _known_digest(path: Path, known: Mapping[str, list[object]]) -> str | None:
    facts = path.stat()
    size, mtime_ns, digest = known.get(path.name, [None, None, None])
    return str(digest) if (size, mtime_ns) == (facts.st_size, facts.st_mtime_ns) else None


# -- reading ---------------------------------------------------------------------


def _check_image(contents: Contents, image: Path, path: Path) -> None:
    """Raise unless it is an image that can boot, and that reaches for nothing outside itself."""
    kernel, rootfs = paths_in(image)
    try:
        if not (kernel.is_file() and rootfs.is_file() and read_manifest(rootfs)):
            raise ImageError("it lacks a kernel, a root disk or its manifest")
        chain = chain_of(rootfs)
        if chain[-1].path.suffix != ".ext4":
            raise ImageError("its root disk lies over nothing")
        for layer in chain:
            if not layer.path.is_file():
                raise ImageError(f"its root disk lies over {layer.path.name}, which it lacks")
        for disk in [*image.glob("*.qcow2"), *image.parent.glob("templates/*/*.qcow2")]:
            _check_disk(disk)
    except ImageError as error:
        raise ImageError(f"{path} is refused: {error.message}", {"path": str(path)}) from error
    if contents.facts.recipe == "":
        raise ImageError(f"{path} does not say what its image was made of", {"path": str(path)})


def _check_disk(disk: Path) -> None:
    # What it lies over is always told to QEMU, whatever its header says; where its data lies
    # is not.
    with disk.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    header = read_header(head) if head.startswith(MAGIC) else None
    if header is None or header.has_data_file:
        raise ImageError(
            f"its disk {disk.name} keeps its data in another file, or is no qcow2 disk"
        )


def _take_key(contents: Contents, private: Path, store: Store, path: Path) -> None:
    if not contents.public_key:
        return
    try:
        public = check_public_key(contents.public_key)
        if any(same_key(public, pair.public_key) for pair in key_pairs(store)):
            return
        import_key_pair(store, private.read_bytes(), public)
    except (ValueError, FileNotFoundError) as error:
        raise ImageError(f"{path} is refused: {error}", {"path": str(path)}) from error


def _take_image(contents: Contents, image: Path, store: Store) -> Path:
    target = store.images / contents.image
    with locked(
        target.with_name(f"{target.name}.lock"),
        operation="waiting for another process to build an image",
        timeout_s=_LOCK_TIMEOUT_S,
    ):
        if not target.is_dir():
            known = {}
            for name, facts in contents.files.items():
                file = image.parent / name
                if file.parent == image:
                    file.chmod(0o644)
                    known[file.name] = [facts.size, file.stat().st_mtime_ns, facts.sha256]
            note_digests(image, known, known)
            write_json(image / FACTS, contents.facts.model_dump())
            image.chmod(0o755)
            put_in_place(image, target)
    return target


def _take_templates(contents: Contents, folder: Path, image: Path, store: Store) -> int:
    """Make its booted guests this host's; return how many there are."""
    noted = noted_digests(image)
    for name, facts in contents.files.items():
        kind, _, file = name.partition("/")
        if kind == "image" and file in noted and noted[file][2] != facts.sha256:
            return 0  # this host has made the same image itself: those are guests of another
    templates = Templates(store)
    taken = 0
    for key, told in contents.templates.items():
        known = _facts_for(told, key, image)
        with templates.making(key, _LOCK_TIMEOUT_S, lambda: None) as may_make:
            if may_make and not (templates.root / key).is_dir():
                templates.make(key, partial(_move_in, folder / key, known))
        taken += 1
    return taken


def _facts_for(told: Mapping[str, object], key: str, image: Path) -> TemplateFacts:
    """What is known of a template, with the paths that its files have here."""
    _, rootfs = paths_in(image)
    try:
        facts = TemplateFacts.model_validate({**told, "key": key, "files": {}})
        config = dict(facts.config)
        for field in ("kernel_path", "rootfs_path", "initrd_path"):
            if config.get(field):
                config[field] = str(image / Path(config[field]).name)
        if any(Path(name).name != name for name in facts.layers):
            raise ImageError(f"the template {key} lies over files outside the archive")
    except ValidationError as error:
        raise ImageError(f"the template {key} cannot be read: {error}") from error
    disk = [str(rootfs), *stat_image(rootfs)]
    return facts.model_copy(update={"config": config, "disk": disk, "fresh": True})


def _move_in(source: Path, facts: TemplateFacts, target: Path) -> TemplateFacts:
    for path in source.iterdir():
        shutil.move(path, target / path.name)
    return facts
