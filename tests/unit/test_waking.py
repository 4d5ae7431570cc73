"""The answers of a guest's agent are heard, or asked for again."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from pytest_smolvm import waking
from pytest_smolvm.errors import OperationTimeoutError
from pytest_smolvm.process import Deadline


@pytest.fixture
def port() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, agents = socket.socketpair()
    with ours, agents:
        yield ours, agents


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waking, "_ANSWER_PATIENCE_S", 0.05)


def test_an_answer_is_heard(port: tuple[socket.socket, socket.socket]) -> None:
    ours, agents = port
    agents.sendall(b"T")
    waking._hear_all(ours, 1, Deadline(10))
    agents.setblocking(False)
    with pytest.raises(BlockingIOError):
        agents.recv(1)  # nothing more was asked


def test_a_guest_that_sleeps_on_a_message_is_sent_another(
    port: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each of them is answered before the next thing is said."""
    ours, agents = port
    sent = waking._send_time

    def wakes_at_the_third(to: socket.socket) -> None:
        sent(to)
        asked.append(agents.recv(100))
        if len(asked) == 3:
            agents.sendall(b"TTTT")

    asked: list[bytes] = []
    monkeypatch.setattr(waking, "_send_time", wakes_at_the_third)
    waking._hear_all(ours, 1, Deadline(10))
    assert [message[:1] for message in asked] == [b"S"] * 3
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        ours.recv(1)


def test_an_agent_that_never_answers_is_not_waited_for(
    port: tuple[socket.socket, socket.socket],
) -> None:
    with pytest.raises(OperationTimeoutError, match="waiting for the guest's agent"):
        waking._hear_all(port[0], 1, Deadline(0.3))
