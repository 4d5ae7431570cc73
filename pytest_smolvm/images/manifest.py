"""What is known of an image, in a file beside it.

``rootfs.ext4.smolvm.json`` says with which host key the guest answers and
which keys may log in. An image without such a file (a copy that left it
behind) is asked itself: the key is read out of its file system.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pytest_smolvm.disks import image_format
from pytest_smolvm.errors import ImageError
from pytest_smolvm.images import ext4
from pytest_smolvm.images.guestfiles import AGENT
from pytest_smolvm.process import ToolError
from pytest_smolvm.statedir import write_atomically

HOST_KEY_IN_IMAGE = "/etc/smolvm/host_key.pub"
AGENT_IN_IMAGE = f"/{AGENT}"


class ImageManifest(BaseModel):
    """Facts about one root disk image."""

    model_config = ConfigDict(extra="ignore")

    name: str = ""
    host_key: str
    """The guest's SSH host key, as in known_hosts: algorithm and base64."""
    authorized_keys: list[str] = []
    """The public keys that may log in; empty: not known."""
    packages: dict[str, str] = {}
    """Versions of the packages that the image was made from."""
    agent: str = ""
    """Where in the image the agent lies that a restored guest needs; empty: it has none."""
    reads_boot_id: bool = True
    """Whether something reads the kernel's boot id while the image boots. Where nothing has, each
    restored guest makes up its own when it is first asked."""
    vsock: bool = False
    """Whether it is reached through vsock, too: on machines without a network."""


def manifest_path(rootfs: Path) -> Path:
    return rootfs.with_name(f"{rootfs.name}.smolvm.json")


def write_manifest(rootfs: Path, manifest: ImageManifest) -> None:
    write_atomically(manifest_path(rootfs), manifest.model_dump_json(indent=1).encode(), mode=0o644)


def read_manifest(rootfs: Path) -> ImageManifest | None:
    """The manifest beside the image, or what the image itself tells; None: neither knows."""
    path = manifest_path(rootfs)
    try:
        return ImageManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return _ask_image(rootfs)
    except (OSError, ValidationError) as error:
        raise ImageError(
            f"{path} is not a manifest that this release can read: remove it and the image "
            f"beside it, and build the image anew\n{error}",
            {"path": str(path)},
        ) from error


def _ask_image(rootfs: Path) -> ImageManifest | None:
    if image_format(rootfs) != "raw":
        return None
    try:
        host_key = ext4.read_file(rootfs, HOST_KEY_IN_IMAGE)
    except ToolError:
        return None  # no debugfs here, or no ext4 there: the caller says what to do
    if not host_key:
        return None
    agent = AGENT_IN_IMAGE if ext4.has_file(rootfs, AGENT_IN_IMAGE) else ""
    return ImageManifest(host_key=host_key.decode().strip(), agent=agent)
