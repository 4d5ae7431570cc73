"""The open SSH connections of one guest: one is kept, more are opened when needed."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import paramiko

from pytest_smolvm import ssh
from pytest_smolvm.errors import OperationTimeoutError
from pytest_smolvm.process import Deadline

_RECONNECT_TIMEOUT_S = 30.0
_KEPT_IDLE = 8


class Connections:
    """Lends out connections, each to one user at a time; whoever comes alone meets just one.

    SSH could carry many commands over one connection, but servers are not up to
    it: OpenSSH refuses more than MaxSessions at a time (sshd_config(5)), and
    dropbear 2022.83 (Debian 12) closes a session that has not begun when the command of
    another one ends (sesscheckclose in svr-chansession.c), at times dying of it.

    ``check_usable`` raises when the machine cannot be talked to. ``is_up``: whether the guest has
    said that its SSH server listens.
    """

    def __init__(
        self,
        address: tuple[str, int],
        login: ssh.Login,
        check_usable: Callable[[], None],
        is_up: Callable[[], bool] = lambda: True,
    ) -> None:
        self._address = address
        self._login = login
        self._check_usable = check_usable
        self._is_up = is_up
        self._idle: list[paramiko.Transport] = []
        self._open: set[paramiko.Transport] = set()
        self._guard = threading.Lock()
        # Servers also limit how many may be logging in at a time (dropbear to 5).
        self._logging_in = threading.Lock()

    def open(self, deadline: Deadline, *, is_up: bool = False) -> float:
        """Wait for the SSH server and log in; returns when the banner came (monotonic).

        ``is_up``: the guest has answered before, so that there is no need to try often. Idle
        connections are closed: they may lead to a server that is no more.
        """
        with self._guard:
            stale, self._idle = self._idle, []
        for transport in stale:
            self._drop(transport)
        transport, banner_at = self._connect(deadline, (lambda: True) if is_up else self._is_up)
        self._give_back(transport)
        return banner_at

    def open_on(self, sock: socket.socket, deadline: Deadline) -> None:
        """Log in over an open socket, at the other end of which an SSH server speaks."""
        transport = ssh.log_in(sock, self._login, deadline)
        with self._guard:
            self._open.add(transport)
        self._give_back(transport)

    def close(self) -> None:
        """Close all connections, those in use as well."""
        with self._guard:
            closing = list(self._open)
            self._open.clear()
            self._idle.clear()
        for transport in closing:
            transport.close()

    @contextlib.contextmanager
    def lend(self, deadline: Deadline) -> Iterator[paramiko.Transport]:
        """A connection for one command; it is closed if that ends in an error."""
        self._check_usable()
        transport = self._take_idle()
        if transport is None:
            patience = Deadline(min(deadline.remaining_s(), _RECONNECT_TIMEOUT_S))
            transport, _ = self._connect(patience, lambda: True)
        try:
            yield transport
        except BaseException:
            # There is no telling what state the server's side is in.
            self._drop(transport)
            raise
        self._give_back(transport)

    def _take_idle(self) -> paramiko.Transport | None:
        while True:
            with self._guard:
                if not self._idle:
                    return None
                transport = self._idle.pop()
            if transport.is_active():
                return transport
            self._drop(transport)

    def _connect(
        self, deadline: Deadline, is_up: Callable[[], bool]
    ) -> tuple[paramiko.Transport, float]:
        if not self._logging_in.acquire(timeout=deadline.remaining_s()):
            raise OperationTimeoutError("waiting for others' logins", deadline.timeout_s)
        try:
            connected = ssh.connect(
                self._address,
                self._login,
                deadline,
                self._check_usable,
                is_up=is_up,
            )
        finally:
            self._logging_in.release()
        with self._guard:
            self._open.add(connected.transport)
        return connected.transport, connected.banner_at

    def _give_back(self, transport: paramiko.Transport) -> None:
        with self._guard:
            # Not one that close() has closed meanwhile.
            keep = transport in self._open and len(self._idle) < _KEPT_IDLE
            if keep:
                self._idle.append(transport)
        if not keep:
            self._drop(transport)

    def _drop(self, transport: paramiko.Transport) -> None:
        with self._guard:
            self._open.discard(transport)
        transport.close()
