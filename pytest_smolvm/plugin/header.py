"""What the run's VMs run on, in one line."""

from __future__ import annotations

from pytest_smolvm.backends import choose
from pytest_smolvm.backends.base import Backend
from pytest_smolvm.errors import SmolVMError
from pytest_smolvm.plugin.settings import Settings
from pytest_smolvm.store import shared_store


def describe_host(settings: Settings) -> str:
    """Backend, accelerator, version and image, and why it is not a quicker accelerator."""
    try:
        backend = choose(shared_store(), settings.config_fields.get("backend"), settings.accel)
    except SmolVMError as error:
        return error.message.partition("\n")[0]
    return f"{describe_backend(backend)}, image {_image(settings)}"


def describe_backend(backend: Backend) -> str:
    """Such as ``qemu 7.2.22, tcg (not kvm: there is no /dev/kvm)``."""
    reasons = f" ({'; '.join(backend.reasons)})" if backend.reasons else ""
    return f"{backend.name} {backend.version()}".rstrip() + f", {backend.accelerator}{reasons}"


def _image(settings: Settings) -> str:
    rootfs = settings.config_fields.get("rootfs_path")
    return str(rootfs) if rootfs else settings.image
