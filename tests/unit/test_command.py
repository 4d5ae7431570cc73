"""Commands: what the guest's shell gets to see, and how a result reads."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import paramiko
import pytest

from pytest_smolvm import (
    CommandFailedError,
    CommandResult,
    OperationTimeoutError,
    SmolVMError,
    command,
)
from pytest_smolvm.command import execute, shell_line, shorten, wrap
from pytest_smolvm.guest import listening_ports
from pytest_smolvm.process import Deadline


def result(exit_code: int = 0, stdout: str = "", stderr: str = "") -> CommandResult:
    return CommandResult(exit_code, stdout, stderr, 0.5, "the command")


def run_here(command: str, **options: object) -> subprocess.CompletedProcess[str]:
    """What a guest's shell would make of it, tried on this host's."""
    text = wrap(
        command,
        token="t0",
        shell="raw",
        cwd=options.get("cwd"),  # type: ignore[arg-type]
        env=options.get("env"),  # type: ignore[arg-type]
    )
    return subprocess.run(["/bin/sh", "-c", text], capture_output=True, text=True, check=False)


def test_a_list_is_quoted_for_the_shell() -> None:
    assert shell_line(["echo", "a b", "$x"]) == "echo 'a b' '$x'"
    assert shell_line("echo $x") == "echo $x"


@pytest.mark.parametrize("command", [[], "a\0b", ["a\0"]])
def test_what_no_shell_could_run_is_refused(command: object) -> None:
    with pytest.raises(SmolVMError):
        shell_line(command)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("command", "status", "output"),
    [
        ("echo hello", 0, "hello\n"),
        ("exit 7", 7, ""),
        ("false", 1, ""),
        ("echo it\\'s # comment", 0, "it's\n"),
        ("cat <<END\nhere\nEND", 0, "here\n"),
        ("sh -c 'kill -9 $$'", 137, ""),
        ("echo a\\", 0, "a\\\n"),
        ("", 0, ""),
    ],
)
def test_the_wrapped_command_is_the_command(command: str, status: int, output: str) -> None:
    done = run_here(command)
    assert (done.returncode, done.stdout) == (status, output)


def test_a_syntax_error_stays_within_the_command() -> None:
    assert run_here("if (").returncode == 2


def test_directory_and_environment_are_the_commands_own() -> None:
    done = run_here('pwd; echo "$KEY"', cwd="/usr", env={"KEY": "it's $x"})
    assert done.stdout == "/usr\nit's $x\n"
    assert run_here("echo never", cwd="/does/not/exist").returncode == 1


def test_everything_that_a_command_starts_carries_its_mark() -> None:
    assert run_here("sh -c 'echo $SMOLVM_RUN'").stdout == "t0\n"


def test_a_wrong_variable_or_shell_is_an_error_that_names_it() -> None:
    with pytest.raises(SmolVMError, match="'1A'"):
        wrap("true", token="t", shell="raw", cwd=None, env={"1A": "x"})
    with pytest.raises(SmolVMError, match="'fish'"):
        wrap("true", token="t", shell="fish", cwd=None, env=None)  # type: ignore[arg-type]


def test_a_result_knows_whether_it_is_ok() -> None:
    assert result().ok
    assert not result(1).ok
    assert result(stdout="  text\n").output == "text"
    assert result().check() == result()


def test_a_failed_check_shows_all_of_it() -> None:
    with pytest.raises(CommandFailedError) as caught:
        result(3, "some output\n", "some error\n").check()
    for part in ("'the command'", "exit status 3", "some output", "some error"):
        assert part in str(caught.value)
    assert caught.value.result.exit_code == 3


def test_long_output_is_shown_without_its_middle() -> None:
    text = shorten("a" * 100 + "b" * 100, limit=100)
    assert text.startswith("a" * 50)
    assert text.endswith("b" * 50)
    assert "100 characters left out" in text


def test_listeners_are_read_from_the_kernels_tables() -> None:
    tables = (
        "  sl  local_address rem_address   st tx_queue\n"
        "   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000\n"
        "   1: 0F02000A:0016 0202000A:9534 01 00000000:00000000 02:00000000\n"
        "   0: 00000000000000000000000000000000:1F90 0000:0000 0A 00000000\n"
    )
    assert listening_ports(tables) == {22, 8080}
    assert listening_ports("") == set()


class _Mute(paramiko.ServerInterface):
    """A server that opens sessions, and says nothing when it is asked to run a command."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.answered = False

    def check_auth_none(self, username: str) -> int:
        return paramiko.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        self.over.wait(10)
        self.answered = True
        return False


def test_a_server_that_does_not_answer_is_waited_for_no_longer_than_the_timeout() -> None:
    ours, theirs = socket.socketpair()
    mute = _Mute()
    with paramiko.Transport(theirs) as server, paramiko.Transport(ours) as client:
        server.add_server_key(paramiko.ECDSAKey.generate())
        server.start_server(event=threading.Event(), server=mute)
        client.start_client(timeout=10)
        client.auth_none("root")
        try:
            with pytest.raises(OperationTimeoutError):
                execute(client, "true", deadline=Deadline(0.3))
            assert client.is_active()
            assert not mute.answered
        finally:
            mute.over.set()
            # Answered in its turn: then nothing is on its way any more to what is closed next.
            client.global_request("ping@example.org", wait=True)


class _Prints(_Mute):
    """A server whose commands print a line and end, when they are told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self._commands: list[threading.Thread] = []

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        self._commands.append(threading.Thread(target=self._run, args=(channel,)))
        self._commands[-1].start()
        return True

    def end(self) -> None:
        self.go.set()
        self.over.set()
        for thread in self._commands:
            thread.join(10)

    def _run(self, channel: paramiko.Channel) -> None:
        self.go.wait(10)
        channel.sendall(b"here")
        channel.send_exit_status(3)
        channel.shutdown_write()
        self.over.wait(10)
        channel.close()


class _Socket(socket.socket):
    """A socket of which one direction can be lost before the other."""

    is_broken = False

    def send(self, *arguments: Any) -> int:
        if self.is_broken:
            raise BrokenPipeError(32, "Broken pipe")
        return super().send(*arguments)


@pytest.fixture
def prints() -> Iterator[tuple[paramiko.Transport, _Prints]]:
    ours, theirs = socket.socketpair()
    ours = _Socket(fileno=ours.detach())
    prints = _Prints()
    with paramiko.Transport(theirs) as server, paramiko.Transport(ours) as client:
        server.add_server_key(paramiko.ECDSAKey.generate())
        server.start_server(event=threading.Event(), server=prints)
        client.start_client(timeout=10)
        client.auth_none("root")
        try:
            yield client, prints
        finally:
            prints.end()


def test_output_that_comes_with_the_end_just_after_nothing_was_there(
    prints: tuple[paramiko.Transport, _Prints], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = prints
    real = paramiko.Channel.recv_ready

    def comes_just_after(channel: paramiko.Channel) -> bool:
        was_there = real(channel)
        if not server.go.is_set():
            server.go.set()
            while not channel.eof_received:
                channel.status_event.wait(0.01)
        return was_there

    monkeypatch.setattr(paramiko.Channel, "recv_ready", comes_just_after)
    printed = bytearray()
    assert execute(client, "it", deadline=Deadline(10), on_stdout=printed.extend) == 3
    assert printed == b"here"


def test_output_that_comes_with_the_status_just_after_a_silence(
    prints: tuple[paramiko.Transport, _Prints], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = prints
    real_start, real_wait = command._start, command.wait_readable
    channels: list[paramiko.Channel] = []

    def noted(*arguments: Any) -> paramiko.Channel:
        channels.append(real_start(*arguments))
        return channels[-1]

    def comes_just_after(descriptor: int, timeout_s: float) -> bool:
        if server.go.is_set():
            return real_wait(descriptor, timeout_s)
        server.go.set()
        channels[-1].status_event.wait(10)
        return False

    monkeypatch.setattr(command, "_start", noted)
    monkeypatch.setattr(command, "wait_readable", comes_just_after)
    printed = bytearray()
    assert execute(client, "it", deadline=Deadline(10), on_stdout=printed.extend) == 3
    assert printed == b"here"


def test_a_command_that_ended_is_not_lost_with_the_connection(
    prints: tuple[paramiko.Transport, _Prints], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = prints
    real_start = command._start

    def breaks(*arguments: Any) -> paramiko.Channel:
        channel = real_start(*arguments)
        client.sock.is_broken = True
        server.go.set()
        return channel

    monkeypatch.setattr(command, "_start", breaks)
    printed = bytearray()
    status = execute(
        client, "it", deadline=Deadline(10), stdin=b"never read", on_stdout=printed.extend
    )
    assert (status, printed) == (3, b"here")
    for thread in threading.enumerate():
        assert thread.name != "smolvm-stdin"


def test_an_error_shows_what_a_command_printed_without_what_drives_terminals() -> None:
    printed = CommandResult(
        1, "\x1b[2J\x1b[31mred\x1b[0m\r\nnext", "\x1b]0;title\x07bell\x07", 0.1, "c"
    )
    with pytest.raises(CommandFailedError) as caught:
        printed.check()
    text = str(caught.value)
    assert "red\nnext" in text
    assert "bell\N{REPLACEMENT CHARACTER}" in text
    assert not {"\x1b", "\x07", "\r"} & set(text)
    assert caught.value.result is printed, "what it really printed is still there"
