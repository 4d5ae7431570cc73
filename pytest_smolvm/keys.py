"""SSH keys: the pair that the library keeps for itself, and the hosts' own."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pytest_smolvm.statedir import locked, make_private_dir, write_atomically
from pytest_smolvm.store import Store

_IMPORTED = "imported"


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


def key_pairs(store: Store) -> list[KeyPair]:
    """The library's own pair, and those that came with images of other hosts."""
    pairs = [library_key_pair(store)]
    for public in sorted((store.keys / _IMPORTED).glob("*.pub")):
        pairs.append(KeyPair(public.with_suffix(""), public.read_text().strip()))
    return pairs


def import_key_pair(store: Store, private: bytes, public_key: str) -> None:
    """Keep the pair that opens the images of another host. ``ValueError`` if it is none."""
    try:
        key = serialization.load_ssh_private_key(private, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"it holds no private key in OpenSSH's format: {error}") from error
    if not isinstance(key, Ed25519PrivateKey) or not same_key(public_openssh(key), public_key):
        raise ValueError("its private key and its public key are not of one pair")
    folder = make_private_dir(make_private_dir(store.keys) / _IMPORTED)
    name = hashlib.sha256(public_key.split()[1].encode()).hexdigest()[:16]
    write_atomically(folder / name, private)
    write_atomically(folder / f"{name}.pub", public_key.encode() + b"\n")


def key_pair_for(store: Store, authorized_keys: Sequence[str]) -> KeyPair:
    """The pair that the lines of an ``authorized_keys`` file let in; else the library's own."""
    pairs = key_pairs(store)
    accepted = (p for p in pairs if any(same_key(p.public_key, line) for line in authorized_keys))
    return next(accepted, pairs[0])


def same_key(one: str, other: str) -> bool:
    """Whether two lines in OpenSSH's format are of one key, whatever comment they end in."""
    return one.split()[:2] == other.split()[:2]


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
