"""The fixtures: a VM for the test, its configuration, and as many more as it wants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from pytest_smolvm.plugin.options import MARKER_ONLY, marker_arguments, settings
from pytest_smolvm.plugin.reporting import remember_vm, show_progress

if TYPE_CHECKING:
    from pytest_smolvm import ImageBuilder, SmolVM, VMConfig


@pytest.fixture(scope="session")
def smolvm_images(pytestconfig: pytest.Config) -> ImageBuilder:
    """The ImageBuilder that makes the images of this run, and shows its progress."""
    from pytest_smolvm.images.builder import ImageBuilder

    return ImageBuilder(progress=lambda line: show_progress(pytestconfig, line))


@pytest.fixture
def smolvm_config(request: pytest.FixtureRequest, smolvm_images: ImageBuilder) -> VMConfig:
    """The VMConfig that the test's VM is about to get; override it to change it."""
    wanted = {**settings(request.config), **_marker(request.node)}
    wanted.pop("boot_timeout", None)
    return _build_config(wanted, smolvm_images)


@pytest.fixture
def smolvm(request: pytest.FixtureRequest, smolvm_config: VMConfig) -> Iterator[SmolVM]:
    """A virtual machine of the test's own, booted; see @pytest.mark.smolvm."""
    with _running(request.node, smolvm_config) as vm:
        yield vm


@pytest.fixture
def smolvm_factory(
    request: pytest.FixtureRequest, smolvm_config: VMConfig
) -> Iterator[Callable[..., SmolVM]]:
    """smolvm_factory(**overrides): one more booted VM; all of them end with the test."""
    from pytest_smolvm.config import VMConfig, generate_vm_id

    with contextlib.ExitStack() as running:

        def make(**overrides: Any) -> SmolVM:
            fields = {**smolvm_config.model_dump(), "vm_id": generate_vm_id(), **overrides}
            return running.enter_context(_running(request.node, VMConfig.model_validate(fields)))

        yield make


@contextlib.contextmanager
def _running(item: pytest.Item, config: VMConfig) -> Iterator[SmolVM]:
    from pytest_smolvm.vm import SmolVM

    vm = SmolVM(config)
    try:
        vm.start(boot_timeout=_marker(item).get("boot_timeout"))
        remember_vm(item, vm)
        yield vm
    finally:
        vm.delete()


def _marker(item: pytest.Item) -> dict[str, Any]:
    from pytest_smolvm.config import VMConfig

    arguments, problem = marker_arguments(item, {*VMConfig.model_fields, *MARKER_ONLY})
    if problem:
        pytest.fail(problem, pytrace=False)
    return arguments


def _build_config(wanted: dict[str, Any], images: ImageBuilder) -> VMConfig:
    from pydantic import ValidationError

    from pytest_smolvm.config import SSH_BOOT_ARGS, VMConfig
    from pytest_smolvm.limits import DEFAULT_IMAGE

    image = wanted.pop("image", DEFAULT_IMAGE)
    wanted.setdefault("boot_args", SSH_BOOT_ARGS)
    if "kernel_path" not in wanted or "rootfs_path" not in wanted:
        kernel, rootfs = images.build(image)
        wanted.setdefault("kernel_path", kernel)
        wanted.setdefault("rootfs_path", rootfs)
    try:
        return VMConfig(**wanted)
    except ValidationError as error:
        problem = f"the VM of this test is not valid:\n{error}"
    pytest.fail(problem, pytrace=False)
