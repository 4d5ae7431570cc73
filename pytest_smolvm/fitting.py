"""What a configuration asks for that a backend does not do."""

from __future__ import annotations

from pytest_smolvm.backends.kernel_args import firecracker_problem
from pytest_smolvm.config import VMConfig
from pytest_smolvm.images.manifest import read_manifest
from pytest_smolvm.limits import host_architecture
from pytest_smolvm.store import VMDirectory


def not_on_firecracker(config: VMConfig, directory: VMDirectory | None) -> list[str]:
    """Why a machine of that configuration cannot be Firecracker's, in words; empty: it can."""
    problems = []
    if problem := firecracker_problem(config.kernel_path, host_architecture()):
        problems.append(problem)
    if directory is not None and directory.disk.suffix == ".qcow2" and directory.disk.exists():
        problems.append("the disk that was kept is qcow2, and it takes raw ones only")
    if config.offers_ssh:
        manifest = read_manifest(config.rootfs_path)
        if manifest is None or not manifest.vsock:
            problems.append(
                f"the image {config.rootfs_path} cannot be reached through vsock; those that "
                "ImageBuilder makes can"
            )
    return problems
