"""Getting in: the wait for a guest's SSH server, its host key, the login."""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import paramiko

from pytest_smolvm.errors import (
    CommandExecutionUnavailableError,
    OperationTimeoutError,
    SmolVMError,
)
from pytest_smolvm.process import Deadline, readable
from pytest_smolvm.terminal import harmless

logger = logging.getLogger(__name__)

# Connections that break are told of in exceptions; what paramiko logs of them at
# level ERROR would only appear on the standard error of programs without logging.
_TRANSPORT_LOG = f"{__name__}.transport"
logging.getLogger(_TRANSPORT_LOG).addHandler(logging.NullHandler())

# An emulated network accepts a connection before anybody listens in the guest, and delivers it
# seconds later, given up or not: a guest that boots is met by all attempts that were made by then.
# Its server answers each of them, and turns others away meanwhile (dropbear has at most 5 that are
# not logged in, by MAX_UNAUTH_PER_IP). So there are few of them until the guest says that it is up.
_PATIENCE_S = 1.0
_PATIENCE_UP_S = 2.0
_ATTEMPTS_AT_A_TIME = 3
_LOOK_S = 0.02
_PAUSE_S = 0.02

_KEY_CLASSES: tuple[type[paramiko.PKey], ...] = (
    paramiko.Ed25519Key,
    paramiko.ECDSAKey,
    paramiko.RSAKey,
)
_USER_KEY_NAMES = ("id_ed25519", "id_ecdsa", "id_rsa")


@dataclass(frozen=True)
class Login:
    """Who logs in, and whom they expect to meet."""

    user: str
    host_key: str
    """The guest's host key: algorithm and base64, as in known_hosts."""
    keys: tuple[paramiko.PKey, ...]
    """Private keys to try, the likeliest first."""


@dataclass(frozen=True)
class Connected:
    """An open, authenticated connection, and when (monotonic clock) the banner came."""

    transport: paramiko.Transport
    banner_at: float


def load_private_key(path: Path) -> paramiko.PKey:
    """The private key in ``path``; else a ``SmolVMError`` that says what is wrong with it."""
    try:
        path.read_bytes()
    except OSError as error:
        raise SmolVMError(f"the SSH key {path} cannot be read: {error.strerror}") from error
    for key_class in _KEY_CLASSES:
        try:
            return key_class.from_private_key_file(str(path))
        except paramiko.PasswordRequiredException:
            raise SmolVMError(
                f"the SSH key {path} has a passphrase: add it to your SSH agent, or give "
                "another key as ssh_key_path"
            ) from None
        except (paramiko.SSHException, ValueError):
            continue
    raise SmolVMError(f"{path} is not a private SSH key (Ed25519, ECDSA or RSA)")


def user_keys() -> list[paramiko.PKey]:
    """The keys that ssh would offer on its own: the agent's, and those in ``~/.ssh``."""
    found: list[paramiko.PKey] = []
    with contextlib.suppress(paramiko.SSHException, OSError):
        found.extend(paramiko.Agent().get_keys())
    for name in _USER_KEY_NAMES:
        path = Path.home() / ".ssh" / name
        if path.is_file():
            with contextlib.suppress(SmolVMError):
                found.append(load_private_key(path))
    return found


def accepted_keys(
    keys: Sequence[paramiko.PKey], authorized: Sequence[str]
) -> tuple[paramiko.PKey, ...]:
    """Those of ``keys`` that the lines of an ``authorized_keys`` file let in."""
    accepted = {line.split()[1] for line in authorized if len(line.split()) > 1}
    return tuple(key for key in keys if key.get_base64() in accepted)


def connect(
    address: tuple[str, int],
    login: Login,
    deadline: Deadline,
    check_alive: Callable[[], None],
    *,
    is_up: Callable[[], bool] = lambda: False,
) -> Connected:
    """Wait until the guest's SSH server answers, and log in.

    ``is_up``: whether the guest has said that it listens; one that never says so is tried every
    second. ``check_alive`` is called again and again, and raises when waiting on is
    pointless. Raises ``OperationTimeoutError`` past the deadline, and
    ``CommandExecutionUnavailableError`` when the guest answers but is not the
    expected one, or refuses every key.
    """
    attempts = _Attempts(address)
    was_up = False
    next_at = time.monotonic()
    try:
        while not deadline.passed():
            check_alive()
            now = time.monotonic()
            if not was_up and is_up():
                was_up, next_at = True, now
            if now >= next_at:
                attempts.make_another(deadline)
                next_at = now + (_PATIENCE_UP_S if was_up else _PATIENCE_S)
            sock = attempts.next_answer(min(_LOOK_S, deadline.remaining_s()))
            if sock is None:
                if attempts.none_is_open:
                    # Refused, which the guest's kernel does at once; or turned away.
                    next_at = min(next_at, time.monotonic() + _PAUSE_S)
                continue
            banner_at = time.monotonic()
            attempts.close()  # the guest has enough to do with one
            try:
                return Connected(log_in(sock, login, deadline), banner_at)
            except (paramiko.SSHException, EOFError, OSError) as error:
                # Not a refusal: a server that is still starting, or going away.
                why = harmless(f"the SSH handshake broke off: {error or type(error).__name__}")
                attempts.last = why
                logger.debug("%s", why)
                next_at = time.monotonic() + _PAUSE_S
    finally:
        attempts.close()
    check_alive()
    raise OperationTimeoutError(
        "waiting for the guest's SSH server", deadline.timeout_s, f"last attempt: {attempts.last}"
    )


class _Attempts:
    """Connections on which no SSH server has spoken yet, the oldest first."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._open: list[socket.socket] = []
        self.last = "no attempt was made"
        """What came of the last one, in words."""

    @property
    def none_is_open(self) -> bool:
        return not self._open

    def make_another(self, deadline: Deadline) -> None:
        """Open one more connection, and give up the oldest if there are too many."""
        if len(self._open) == _ATTEMPTS_AT_A_TIME:
            self._open.pop(0).close()
        try:
            self._open.append(_open(self._address, min(1.0, max(0.01, deadline.remaining_s()))))
        except OSError as error:
            self.last = f"connecting to {self._address[0]}:{self._address[1]}: {error}"
        else:
            self.last = "the connection was accepted, but no SSH server spoke"

    def next_answer(self, timeout_s: float) -> socket.socket | None:
        """Wait until a server speaks on one, which is the caller's to close then."""
        if not self._open:
            time.sleep(timeout_s)
        for sock in readable(self._open, timeout_s):
            self._open.remove(sock)
            try:
                if sock.recv(1, socket.MSG_PEEK):
                    return sock
            except OSError as error:
                self.last = f"the connection broke off: {error}"
            sock.close()
        return None

    def close(self) -> None:
        """Give up those that are open."""
        while self._open:
            self._open.pop().close()


def _open(address: tuple[str, int], timeout_s: float) -> socket.socket:
    sock = socket.create_connection(address, timeout=timeout_s)
    # With Nagle's algorithm on, each of the handshake's small packets waits for
    # the acknowledgement of the one before.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def log_in(sock: socket.socket, login: Login, deadline: Deadline) -> paramiko.Transport:
    """Log in over an open socket, which is closed if that fails.

    Raises ``CommandExecutionUnavailableError`` for a server that is not the expected one or
    lets nobody in, and what paramiko raises when the conversation breaks off.
    """
    sock.settimeout(None)
    transport = paramiko.Transport(sock)
    transport.set_log_channel(_TRANSPORT_LOG)
    transport.banner_timeout = deadline.remaining_s()
    transport.handshake_timeout = deadline.remaining_s()
    transport.auth_timeout = max(0.01, deadline.remaining_s())
    try:
        algorithm, expected = _parse_host_key(login.host_key)
        _prefer_host_key(transport, algorithm)
        transport.start_client(timeout=max(0.01, deadline.remaining_s()))
        met = transport.get_remote_server_key()
        if met.asbytes() != expected:
            raise CommandExecutionUnavailableError(
                f"The SSH server at {sock.getpeername()} has the host key {met.get_name()} "
                f"{met.get_base64()}, which is not the image's: it may not be this VM at all.",
                f"The image's key is {login.host_key}; if the image was changed on purpose, "
                "update the manifest beside it (its name ends in .smolvm.json).",
            )
        _authenticate(transport, login)
    except BaseException:
        transport.close()
        raise
    return transport


def _authenticate(transport: paramiko.Transport, login: Login) -> None:
    tried = []
    for key in login.keys:
        try:
            transport.auth_publickey(login.user, key)
        except paramiko.AuthenticationException:
            tried.append(f"{key.get_name()} {key.get_base64()[-12:]}")
            if not transport.is_active():
                break
        else:
            return
    raise CommandExecutionUnavailableError(
        f"The guest refuses to let {login.user!r} in with "
        + (f"any of the keys tried ({', '.join(tried)})." if tried else "no key at all."),
        "Give the private key that belongs to the image as ssh_key_path, or build the image with "
        "the public key that you have.",
    )


def _prefer_host_key(transport: paramiko.Transport, algorithm: str) -> None:
    # A server with several host keys shall show the one we know.
    options = transport.get_security_options()
    if algorithm == "ssh-rsa":
        options.key_types = ("rsa-sha2-512", "rsa-sha2-256")
    elif algorithm in options.key_types:
        options.key_types = (algorithm,)


def _parse_host_key(line: str) -> tuple[str, bytes]:
    words = line.split()
    try:
        return words[0], base64.b64decode(words[1], validate=True)
    except (IndexError, binascii.Error):
        raise SmolVMError(
            f"{line[:80]!r} is not an SSH host key: it should read like 'ssh-ed25519 AAAA...'"
        ) from None
