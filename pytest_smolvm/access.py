"""What it takes to get into a VM: keys, the host key, and lines to paste."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from pytest_smolvm import ssh
from pytest_smolvm.config import VMConfig
from pytest_smolvm.errors import CommandExecutionUnavailableError
from pytest_smolvm.images.manifest import HOST_KEY_IN_IMAGE, manifest_path, read_manifest
from pytest_smolvm.keys import key_pair_for
from pytest_smolvm.statedir import write_atomically
from pytest_smolvm.store import Store


def check_offers_ssh(config: VMConfig) -> None:
    """Raise ``CommandExecutionUnavailableError`` for a VM that was not asked to start SSH."""
    if not config.offers_ssh:
        raise CommandExecutionUnavailableError(
            f"The VM {config.vm_id!r} was not configured for SSH: its boot arguments lack "
            "'init=/init'.",
            "Use boot_args=SSH_BOOT_ARGS with an image that ImageBuilder made.",
            {"boot_args": config.boot_args},
        )


def prepare_login(config: VMConfig, user: str, key_path: Path | None, store: Store) -> ssh.Login:
    """Who logs in with which keys, and the host key that the image is known to have.

    Without ``key_path``: the library's own key, or the one that came with an imported image; where
    the image accepts neither, those of the user's agent and ``~/.ssh``. An image with
    no known host key is refused: any SSH server could pass for it.
    """
    manifest = read_manifest(config.rootfs_path)
    if manifest is None:
        raise CommandExecutionUnavailableError(
            f"The SSH host key of the image {config.rootfs_path} is not known.",
            f"Write it to {manifest_path(config.rootfs_path)} as "
            '{"host_key": "ssh-ed25519 AAAA..."}, or into the image as '
            f"{HOST_KEY_IN_IMAGE}; images made by ImageBuilder have both.",
            {"rootfs_path": str(config.rootfs_path)},
        )
    if key_path is not None:
        return ssh.Login(user, manifest.host_key, (ssh.load_private_key(key_path),))
    own = ssh.load_private_key(key_pair_for(store, manifest.authorized_keys).private_path)
    keys = ssh.accepted_keys([own], manifest.authorized_keys)
    if not keys:
        candidates = (own, *ssh.user_keys())
        # An image whose keys are not known is offered all of them.
        keys = ssh.accepted_keys(candidates, manifest.authorized_keys) or candidates
    return ssh.Login(user, manifest.host_key, keys)


def paste_lines(
    *,
    vm_id: str,
    directory: Path,
    address: tuple[str, int],
    user: str,
    host_key: str,
    key_path: Path | None,
) -> dict[str, str]:
    """Command lines for a person, which check the host key as strictly as the library does."""
    host, port = address
    known_hosts = directory / "known_hosts"
    write_atomically(known_hosts, f"[{host}]:{port} {host_key}\n".encode())
    options = ["-o", f"UserKnownHostsFile={_ssh_option(known_hosts)}"]
    options += ["-o", "StrictHostKeyChecking=yes"]
    if key_path is not None:
        # -i would look for the file by its name as it is, and then for what % stands for in it.
        odd = "%" in str(key_path)
        key = ["-o", f"IdentityFile={_ssh_option(key_path)}"] if odd else ["-i", str(key_path)]
        options += ["-o", "IdentitiesOnly=yes", *key]
    login = f"{user}@{host}"
    return {
        "vm_id": vm_id,
        "ssh": shlex.join(["ssh", *options, "-p", str(port), login]),
        "copy_to_guest": shlex.join(
            ["scp", "-O", *options, "-P", str(port), "LOCAL", f"{login}:REMOTE"]
        ),
        "copy_from_guest": shlex.join(
            ["scp", "-O", *options, "-P", str(port), f"{login}:REMOTE", "LOCAL"]
        ),
    }


def _ssh_option(path: Path) -> str:
    """A path as the value of an option of ssh, which splits it at spaces: ssh_config(5)."""
    text = str(path).replace("%", "%%")
    if not re.search(r"[\s\"'\\#]", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
