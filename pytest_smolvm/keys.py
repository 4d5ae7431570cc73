"""SSH keys: the pair that the library keeps for itself, and the hosts' own."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pytest_smolvm.statedir import locked, make_private_dir, write_atomically
from pytest_smolvm.store import Store


@dataclass(frozen=True)
class KeyPair:
    """A key pair on disk: the private half (0600, OpenSSH format) and the public line."""

    private_path: Path
    public_key: str


def library_key_pair(store: Store) -> KeyPair:
    """The pair in the state directory, made when there is none yet."""
    directory = make_private_dir(store.keys)
    private, public = directory / "id_ed25519", directory / "id_ed25519.pub"
    if not (private.exists() and public.exists()):
        with locked(directory / "lock", operation="making the SSH key pair", timeout_s=30):
            if not (private.exists() and public.exists()):
                key = Ed25519PrivateKey.generate()
                write_atomically(private, private_openssh(key))
                write_atomically(public, public_openssh(key, "pytest-smolvm").encode() + b"\n")
    return KeyPair(private, public.read_text().strip())


def private_openssh(key: Ed25519PrivateKey) -> bytes:
    """The private key as ``ssh-keygen`` writes it."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def public_openssh(key: Ed25519PrivateKey, comment: str = "") -> str:
    """The public key as one ``authorized_keys`` line."""
    line = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return f"{line.decode()} {comment}".strip()


def private_dropbear(key: Ed25519PrivateKey) -> bytes:
    """The private key as dropbear reads its host key.

    Two SSH strings: the algorithm's name, then seed and public half together
    (``buf_put_ed25519_priv_key`` in dropbear's sources).
    """
    seed = key.private_bytes(
        serialization.Encoding.Raw,
        serialization.PrivateFormat.Raw,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.Raw, serialization.PublicFormat.Raw
    )
    return _ssh_string(b"ssh-ed25519") + _ssh_string(seed + public)


def check_public_key(line: str) -> str:
    """``line``, if it is one public key in OpenSSH's format; else ``ValueError``."""
    text = line.strip()
    if "\n" in text or "\r" in text:
        raise ValueError("the public key must be a single line, as in ~/.ssh/id_ed25519.pub")
    try:
        serialization.load_ssh_public_key(text.encode())
    except Exception as error:
        raise ValueError(
            f"{text[:60]!r} is not a public key in OpenSSH's format: give the text of a file such "
            "as ~/.ssh/id_ed25519.pub"
        ) from error
    return text


def _ssh_string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data
