"""The wait for an SSH server: few attempts at a guest that boots, one at once when it is up."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pytest_smolvm import ssh
from pytest_smolvm.errors import OperationTimeoutError
from pytest_smolvm.process import Deadline

LOGIN: Any = object()


class Server:
    """Accepts like an emulated network: at once, whether or not anybody speaks behind it."""

    def __init__(self) -> None:
        self.taken: list[socket.socket] = []
        self.speaks_on_connection = 10**6
        self.turns_away = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listening.getsockname()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            taken, _ = self._listening.accept()
            self.taken.append(taken)
            if self._listening.fileno() < 0 or self.taken[-1].getpeername() == self._end:
                return
            if len(self.taken) <= self.turns_away:
                taken.close()
            elif len(self.taken) >= self.speaks_on_connection:
                taken.sendall(b"SSH-2.0-there\r\n")

    _end: object = None

    def close(self) -> None:
        last = socket.socket()
        last.bind(("127.0.0.1", 0))
        self._end = last.getsockname()
        last.connect(self.address)
        self._thread.join(10)
        for sock in (last, *self.taken, self._listening):
            sock.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with contextlib.closing(Server()) as made:
        yield made


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "log_in", lambda sock, *_: sock)


def test_a_guest_that_boots_is_tried_every_second(server: Server) -> None:
    """What it is sent before it listens it gets all at once, and may turn others away for it."""
    with pytest.raises(OperationTimeoutError, match="but no SSH server spoke"):
        ssh.connect(server.address, LOGIN, Deadline(2.5), lambda: None)
    assert 1 <= len(server.taken) <= 3


def test_a_guest_that_says_it_is_up_is_tried_at_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "_PATIENCE_S", 1000.0)
    server.speaks_on_connection = 2
    connected = ssh.connect(
        server.address, LOGIN, Deadline(30), lambda: None, is_up=lambda: bool(server.taken)
    )
    assert connected.transport.recv(100) == b"SSH-2.0-there\r\n"  # type: ignore[attr-defined]
    assert len(server.taken) == 2
    # The other one was given up, so that the guest need not go on with it.
    assert server.taken[0].recv(1) == b""
    connected.transport.close()


def test_a_guest_that_never_says_so_is_reached_all_the_same(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "_PATIENCE_S", 0.05)
    server.speaks_on_connection = 6
    connected = ssh.connect(server.address, LOGIN, Deadline(30), lambda: None)
    assert connected.transport.recv(100) == b"SSH-2.0-there\r\n"  # type: ignore[attr-defined]
    connected.transport.close()


def test_who_is_turned_away_comes_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "_PATIENCE_UP_S", 1000.0)
    server.turns_away, server.speaks_on_connection = 3, 4
    ssh.connect(
        server.address, LOGIN, Deadline(30), lambda: None, is_up=lambda: True
    ).transport.close()
    assert len(server.taken) == 4


def test_a_machine_that_ends_is_not_waited_for(server: Server) -> None:
    def ended() -> None:
        if server.taken:
            raise ChildProcessError("it is gone")

    with pytest.raises(ChildProcessError, match="it is gone"):
        ssh.connect(server.address, LOGIN, Deadline(1000), ended)
