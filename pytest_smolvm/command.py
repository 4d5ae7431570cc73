"""Commands in a guest: what one is, how it is run over SSH, what came of it."""

from __future__ import annotations

import contextlib
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import paramiko

from pytest_smolvm.config import check_env_vars
from pytest_smolvm.errors import CommandFailedError, OperationTimeoutError, SmolVMError
from pytest_smolvm.process import Deadline, wait_readable
from pytest_smolvm.terminal import harmless

Shell = Literal["login", "raw"]

_CHUNK_BYTES = 1 << 18
_QUIET_S = 0.25
_KILL_TIMEOUT_S = 5.0
_SHOWN_OUTPUT_CHARS = 20_000
OUTPUT_LIMIT_BYTES = 256 << 20
"""What a command may print, on both streams together: all of it is kept in memory."""


class RunOptions(TypedDict, total=False):
    """The options of ``run``; most of them are told of at ``SmolVM.run``."""

    shell: Shell
    input: str | bytes | None
    cwd: str | None
    env: Mapping[str, str] | None
    on_output: Callable[[bytes], object] | None
    kill_timeout_s: float


@dataclass(frozen=True)
class CommandResult:
    """What came of one command.

    ``exit_code`` is the shell's: 128 + N for a command that signal N killed; -1
    when the guest reported none. ``stdout`` and ``stderr`` are decoded as UTF-8,
    with U+FFFD for what is not UTF-8. ``duration_s`` is seconds on this host.
    """

    exit_code: int
    stdout: str
    stderr: str
    duration_s: float
    command: str

    @property
    def ok(self) -> bool:
        """Whether the exit status is 0."""
        return self.exit_code == 0

    @property
    def output(self) -> str:
        """``stdout`` without the white space around it."""
        return self.stdout.strip()

    def check(self) -> CommandResult:
        """This result, if it is ``ok``; else ``CommandFailedError`` that shows all of it."""
        if not self.ok:
            raise CommandFailedError(self)
        return self

    def describe(self) -> str:
        """The whole result in words."""
        return (
            f"{self.command!r} ended with exit status {self.exit_code} in {self.duration_s:.2f} s"
            + _sections(self.stdout, self.stderr)
        )


def _sections(stdout: str, stderr: str) -> str:
    text = ""
    for name, output in (("stdout", stdout), ("stderr", stderr)):
        text += (
            f"\n--- {name} ---\n{harmless(shorten(output))}" if output else f"\n({name} is empty)"
        )
    return text


def shorten(text: str, limit: int = _SHOWN_OUTPUT_CHARS) -> str:
    """``text``, without its middle when it is longer than ``limit`` characters."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def shell_line(command: str | Sequence[str]) -> str:
    """``command`` as text for a shell: a list of arguments is quoted for it."""
    if isinstance(command, str):
        text = command
    else:
        words = list(command)
        if not words:
            raise SmolVMError("the command is an empty list: give a program and its arguments")
        text = shlex.join(words)
    if "\0" in text:
        raise SmolVMError(f"the command {text[:80]!r} holds a NUL character: remove it")
    return text


def wrap(
    command: str, *, token: str, shell: Shell, cwd: str | None, env: Mapping[str, str] | None
) -> str:
    """The text that the guest's shell gets to see.

    ``token`` marks the shell, and through its environment all that it starts,
    so that a command that overstays can be found and killed. The command
    itself goes through ``eval``: whatever is wrong with its syntax stays within
    it, and the shell stays, to report an exit status even for a killed command.
    """
    if shell not in ("login", "raw"):
        raise SmolVMError(f"shell={shell!r} is not valid: use 'login' or 'raw'")
    lines = [f"export SMOLVM_RUN={token}"]
    if shell == "login":
        # What a login shell reads, without the cost of starting another one.
        lines.append("[ -r /etc/profile ] && . /etc/profile")
        lines.append('[ -r "$HOME/.profile" ] && . "$HOME/.profile"')
    if cwd is not None:
        lines.append(f"cd {shlex.quote(str(cwd))} || exit 1")
    try:
        variables = check_env_vars(env or {})
    except ValueError as error:
        raise SmolVMError(str(error)) from None
    lines += [f"export {key}={shlex.quote(value)}" for key, value in variables.items()]
    lines.append(f"eval {shlex.quote(command)}")
    lines.append("exit $?")
    return "\n".join(lines)


def run(
    transport: paramiko.Transport,
    command: str | Sequence[str],
    deadline: Deadline,
    *,
    shell: Shell = "login",
    input: str | bytes | None = None,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    on_output: Callable[[bytes], object] | None = None,
    kill_timeout_s: float = _KILL_TIMEOUT_S,
) -> CommandResult:
    """Run one command to its end, or kill it in the guest when its time is up.

    ``on_output`` is given what it prints, on either stream, as it comes.
    ``kill_timeout_s``: seconds that the killing may take.
    """
    line = shell_line(command)
    token = secrets.token_hex(8)
    room = _Room(OUTPUT_LIMIT_BYTES)
    wrapped = wrap(line, token=token, shell=shell, cwd=cwd, env=env)
    stdout, stderr = bytearray(), bytearray()
    stdin = input.encode() if isinstance(input, str) else input
    started = time.monotonic()
    try:
        exit_code = execute(
            transport,
            wrapped,
            deadline=deadline,
            stdin=stdin,
            on_stdout=_tee(stdout, room, on_output),
            on_stderr=_tee(stderr, room, on_output),
        )
    except _OutputTooLargeError:
        kill_marked(transport, token, kill_timeout_s)
        raise SmolVMError(
            f"the command {line!r} printed more than {OUTPUT_LIMIT_BYTES >> 20} MiB and was "
            "killed: have it write to a file in the guest, and get() that"
            + _sections(
                *(part[:_SHOWN_OUTPUT_CHARS].decode(errors="replace") for part in (stdout, stderr))
            ),
            {"command": line},
        ) from None
    except OperationTimeoutError:
        killed = kill_marked(transport, token, kill_timeout_s)
        printed = stdout.decode(errors="replace"), stderr.decode(errors="replace")
        raise OperationTimeoutError(
            f"the command {line!r}",
            deadline.timeout_s,
            (
                "it was killed in the guest"
                if killed
                else "it could not be killed in the guest, which does not answer"
            )
            + _sections(*printed),
            stdout=printed[0],
            stderr=printed[1],
            details={"command": line, "killed": killed},
        ) from None
    return CommandResult(
        exit_code=exit_code,
        stdout=stdout.decode(errors="replace"),
        stderr=stderr.decode(errors="replace"),
        duration_s=time.monotonic() - started,
        command=line,
    )


class _OutputTooLargeError(Exception):
    """A command prints more than anybody wants to keep."""


class _Room:
    """How many bytes may be kept still."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise _OutputTooLargeError


def _tee(
    kept: bytearray, room: _Room, on_output: Callable[[bytes], object] | None
) -> Callable[[bytes], object]:
    def take(data: bytes) -> None:
        room.take(len(data))
        kept.extend(data)
        if on_output is not None:
            on_output(data)

    return take


def kill_marked(
    transport: paramiko.Transport, token: str, timeout_s: float = _KILL_TIMEOUT_S
) -> bool:
    """Kill every process in the guest that carries ``token``; whether that was done."""
    # The brackets keep the pattern from matching the command that looks for it.
    script = (
        "for process in /proc/[0-9]*; do "
        f"grep -q '[S]MOLVM_RUN={token}' $process/environ $process/cmdline 2>/dev/null "
        "&& kill -9 ${process#/proc/}; done; exit 0"
    )
    try:
        status = execute(transport, script, deadline=Deadline(timeout_s))
    except (SmolVMError, paramiko.SSHException, OSError, EOFError):
        return False
    return status == 0


def execute(
    transport: paramiko.Transport,
    line: str,
    *,
    deadline: Deadline,
    stdin: bytes | None = None,
    on_stdout: Callable[[bytes], object] = bytes,
    on_stderr: Callable[[bytes], object] = bytes,
) -> int:
    """Have the guest's shell run ``line``; returns its exit status (-1: none reported).

    Both streams are drained as they come. Past the deadline the channel is
    closed and ``OperationTimeoutError`` raised; what runs in the guest runs on.
    A connection that ends first is a ``ConnectionError`` or paramiko's own.
    """
    operation = "the command"
    channel = _start(transport, line, deadline)
    feeder = None
    try:
        if stdin:
            feeder = threading.Thread(
                target=_feed, args=(channel, stdin), name="smolvm-stdin", daemon=True
            )
            feeder.start()
        else:
            channel.shutdown_write()
        ready = channel.fileno()
        while True:
            moved = False
            # Looked at before what has come is taken: more may come at any moment, and these last.
            ended = channel.eof_received or channel.closed
            has_status = channel.exit_status_ready()
            if channel.recv_ready():
                on_stdout(channel.recv(_CHUNK_BYTES))
                moved = True
            if channel.recv_stderr_ready():
                on_stderr(channel.recv_stderr(_CHUNK_BYTES))
                moved = True
            if deadline.passed():
                raise OperationTimeoutError(operation, deadline.timeout_s)
            if moved:
                continue
            if ended:
                break
            readable = wait_readable(ready, min(_QUIET_S, deadline.remaining_s()))
            # A daemon that the command left behind may hold its output open for
            # ever; the command itself is over once its status has come, and nothing since.
            if not readable and has_status:
                break
        if not channel.status_event.wait(deadline.remaining_s()):
            raise OperationTimeoutError(operation, deadline.timeout_s)
        status = channel.recv_exit_status()
        if status == -1 and not transport.is_active():
            raise ConnectionError("the SSH connection ended before the command did")
        return status
    finally:
        _close(channel)
        if feeder is not None:
            feeder.join(1)


def _start(transport: paramiko.Transport, line: str, deadline: Deadline) -> paramiko.Channel:
    """A channel on which the guest was asked to run ``line``, and said that it does."""
    try:
        # 0 would mean "wait for ever" to paramiko.
        channel = transport.open_session(timeout=max(0.001, deadline.remaining_s()))
    except paramiko.SSHException:
        if deadline.passed() and transport.is_active():
            raise OperationTimeoutError("the command", deadline.timeout_s) from None
        raise
    # exec_command() knows no timeout, but ends when its channel is closed.
    watchdog = threading.Timer(deadline.remaining_s(), _close, [channel])
    watchdog.daemon = True
    watchdog.start()
    try:
        channel.exec_command(line)
        channel.settimeout(max(0.001, deadline.remaining_s()))
    except paramiko.SSHException:
        _close(channel)
        if deadline.passed() and transport.is_active():
            raise OperationTimeoutError("the command", deadline.timeout_s) from None
        raise
    except BaseException:
        _close(channel)
        raise
    finally:
        watchdog.cancel()
    return channel


# What paramiko raises where it writes to a connection that ends just then. Whoever waits for the
# command's end learns of it from the reading side.
_CONNECTION_ENDS = (OSError, EOFError, paramiko.SSHException)


def _close(channel: paramiko.Channel) -> None:
    with contextlib.suppress(*_CONNECTION_ENDS):
        channel.close()


def _feed(channel: paramiko.Channel, data: bytes) -> None:
    # A command may end, or its deadline pass, before it has read its input.
    with contextlib.suppress(*_CONNECTION_ENDS):
        channel.sendall(data)
        channel.shutdown_write()
