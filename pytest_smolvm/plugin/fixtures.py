"""The fixtures: a VM for the test, its configuration, and as many more as it wants."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from pytest_smolvm.images.projects import find_project
from pytest_smolvm.plugin.progress import show_progress, shown_live
from pytest_smolvm.plugin.session import end_with_controller, existing_fleet, fleet_of
from pytest_smolvm.plugin.settings import settings_of
from pytest_smolvm.plugin.summary import wants_vm_of_its_own
from pytest_smolvm.plugin.wanted import (
    Wanted,
    WrongMarkerError,
    apply,
    from_settings,
    wanted_by,
)

if TYPE_CHECKING:
    from pytest_smolvm import ImageBuilder, ImageError, SmolVM, VMConfig

_failed_images = pytest.StashKey[dict[str, "ImageError"]]()
"""Why images could not be built in this run, by name and architecture."""


@pytest.fixture(scope="session")
def smolvm_images(pytestconfig: pytest.Config) -> ImageBuilder:
    """The ImageBuilder that makes the images of this run, and shows its progress."""
    from pytest_smolvm.image_builder import ImageBuilder

    end_with_controller(pytestconfig)
    return ImageBuilder(
        progress=lambda line: show_progress(pytestconfig, line),
        project=find_project(pytestconfig.rootpath),
        on_output=shown_live(pytestconfig),
    )


@pytest.fixture
def smolvm_config(request: pytest.FixtureRequest, smolvm_images: ImageBuilder) -> VMConfig:
    """The VMConfig that the test's VM is about to get; override it to change it."""
    return _configure(request.node, _wanted(request), smolvm_images, request.config)


@pytest.fixture
def smolvm(request: pytest.FixtureRequest, smolvm_config: VMConfig) -> SmolVM:
    """A virtual machine, booted: the test's own, or its scope's; see @pytest.mark.smolvm."""
    return fleet_of(request.config).lease(request.node, smolvm_config, _wanted(request))


@pytest.fixture
def smolvm_factory(
    request: pytest.FixtureRequest, smolvm_config: VMConfig, smolvm_images: ImageBuilder
) -> Callable[..., SmolVM]:
    """smolvm_factory(**overrides): one more booted VM; all of them end with the test."""
    from pytest_smolvm.config import VMConfig, generate_vm_id
    from pytest_smolvm.errors import SmolVMError

    asked_for = _wanted(request)

    def make(**overrides: Any) -> SmolVM:
        base = {**smolvm_config.model_dump(), "vm_id": generate_vm_id()}
        other_image = "image" in overrides or "arch" in overrides
        if other_image:
            for name in ("kernel_path", "rootfs_path", "initrd_path"):
                base.pop(name)
        try:
            wanted = apply(overrides, asked_for, "smolvm_factory")
        except WrongMarkerError as error:
            raise SmolVMError(str(error)) from None
        fields = {**base, **{key: wanted.config_fields[key] for key in overrides if key in base}}
        if other_image:
            image = smolvm_images.build(wanted.image, arch=wanted.arch)
            fields["kernel_path"], fields["rootfs_path"] = image
            fields |= {key: overrides[key] for key in overrides if key.endswith("_path")}
        config = VMConfig.model_validate(fields)
        return fleet_of(request.config).lease(request.node, config, wanted, shared=False)

    return make


@pytest.fixture(scope="session")
def smolvm_session(request: pytest.FixtureRequest, smolvm_images: ImageBuilder) -> SmolVM:
    """One virtual machine for the whole session (of each xdist worker), by the options alone."""
    wanted = from_settings(settings_of(request.config))
    config = _configure(request.session, wanted, smolvm_images, request.config)
    return fleet_of(request.config).lease_for_session(request.session, config, wanted)


def _wanted(request: pytest.FixtureRequest) -> Wanted:
    try:
        return wanted_by(request.node, settings_of(request.config))
    except WrongMarkerError as error:
        problem = str(error)
    pytest.fail(problem, pytrace=False)


def config_of(wanted: Wanted, images: ImageBuilder) -> VMConfig:
    """The VMConfig of what is wanted. Raises pydantic's ``ValidationError``."""
    from pytest_smolvm.config import SSH_BOOT_ARGS, VMConfig

    fields = {"boot_args": SSH_BOOT_ARGS, **wanted.config_fields}
    if "kernel_path" not in fields or "rootfs_path" not in fields:
        kernel, rootfs = images.build(wanted.image, arch=wanted.arch)
        fields = {"kernel_path": kernel, "rootfs_path": rootfs, **fields}
    return VMConfig(**fields)


def _with_id_of_ready(
    config: VMConfig, item: pytest.Item | pytest.Session, wanted: Wanted
) -> VMConfig:
    """``config``, with the id of the VM that was made ready for the test, if there is one."""
    fleet = existing_fleet(item.config)
    if fleet is None or not isinstance(item, pytest.Item) or not wants_vm_of_its_own(item):
        return config
    vm_id = fleet.id_of_ready(item, wanted)
    if vm_id is None:
        return config
    named = config.model_copy(update={"vm_id": vm_id})
    named.model_fields_set.discard("vm_id")  # nobody asked for this one
    return named


def _configure(
    item: pytest.Item | pytest.Session,
    wanted: Wanted,
    images: ImageBuilder,
    config: pytest.Config,
) -> VMConfig:
    """The VMConfig of what is wanted, as the hook leaves it."""
    from pydantic import ValidationError

    from pytest_smolvm.config import VMConfig
    from pytest_smolvm.errors import ImageError, SmolVMError

    failed = config.stash.setdefault(_failed_images, {})
    image = f"{wanted.image} {wanted.arch}"
    if image in failed:
        raise failed[image]  # trying again, for each test, would fail again
    try:
        made = _with_id_of_ready(config_of(wanted, images), item, wanted)
    except ImageError as error:
        failed[image] = error
        raise
    except ValidationError as error:
        problem = f"the VM of this test is not valid:\n{error}"
    else:
        changed = config.hook.pytest_smolvm_config(item=item, config=made)
        if changed is not None and not isinstance(changed, VMConfig):
            raise SmolVMError(
                f"a pytest_smolvm_config hook returned {changed!r}: return a VMConfig, or None"
            )
        return made if changed is None else changed
    pytest.fail(problem, pytrace=False)
