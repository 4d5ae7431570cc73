"""The one place that starts processes: tools that end, machines that stay."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_smolvm.confinement import Limits, environment, find_setpriv, privileges, ulimits
from pytest_smolvm.errors import SmolVMError
from pytest_smolvm.hostloop import call_on_host_loop


class ToolError(SmolVMError):
    """A host tool is missing, failed or did not end; carries what it printed."""


def find_tool(name: str, package: str) -> str:
    """The full path of host tool ``name``, or an error that names its Debian package.

    Administrators' tools (mkfs and the like) are found although an ordinary
    user's PATH leaves their folders out.
    """
    path = os.environ.get("PATH", os.defpath)
    found = shutil.which(name, path=f"{path}:/usr/sbin:/sbin")
    if found is None:
        raise ToolError(
            f"{name!r} is not installed, or not on PATH; on Debian: apt-get install {package}",
            {"tool": name, "package": package},
        )
    return found


def run_tool(
    argv: Sequence[str],
    *,
    timeout_s: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
) -> str:
    """Run a host tool to its end and return its standard output.

    A tool that fails or outlives ``timeout_s`` is a ``ToolError`` with its output.
    It is killed if this process dies: what it writes to may be cleared away then.
    """
    if shutil.which(argv[0]) is None:
        raise ToolError(f"{argv[0]} could not be started: no such program", {"argv": list(argv)})
    try:
        done = run_to_end(argv, timeout_s=timeout_s, cwd=cwd, env=env, stdin=stdin)
    except subprocess.TimeoutExpired as error:
        raise ToolError(
            f"{shlex.join(argv)} did not end within {timeout_s:g} s",
            {"argv": list(argv), "output": _text(error.stdout) + _text(error.stderr)},
        ) from None
    except OSError as error:
        raise ToolError(
            f"{argv[0]} could not be started: {error.strerror}", {"argv": list(argv)}
        ) from error
    stdout, stderr = _text(done.stdout), _text(done.stderr)
    if done.returncode != 0:
        raise ToolError(
            f"{shlex.join(argv)} failed with exit status {done.returncode}:\n"
            f"{(stderr or stdout).strip()[-4000:]}",
            {"argv": list(argv), "exit_status": done.returncode, "output": stdout + stderr},
        )
    return stdout


def run_to_end(
    argv: Sequence[str],
    *,
    timeout_s: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end, whatever its exit status; it is killed if this process dies.

    Raises ``subprocess.TimeoutExpired``, having killed it, and ``OSError``.
    """
    return subprocess.run(
        [*_die_with_parent(), *argv],
        cwd=cwd,
        env=None if env is None else {**os.environ, **env},
        input=stdin,
        capture_output=True,
        timeout=timeout_s,
        check=False,
        # Ctrl-C is for us: we end the program ourselves, and clean up after it.
        start_new_session=True,
    )


def _text(data: bytes | str | None) -> str:
    return data.decode(errors="replace") if isinstance(data, bytes) else data or ""


class MachineProcess:
    """A long-lived child that the kernel kills when this process ends, however it ends."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        cwd: Path,
        log: Path,
        pass_fds: Sequence[int],
        limits: Limits | None = None,
        drop_capabilities: bool = True,
        stdout: int | None = None,
    ) -> None:
        """``stdout``: the descriptor for its standard output; None: that is logged, too."""
        self.argv = list(argv)
        self._log = log
        log.touch(mode=0o600)
        with log.open("wb") as output:
            self._popen = call_on_host_loop(
                lambda: subprocess.Popen(
                    [*_confined(limits, drop_capabilities=drop_capabilities), *argv],
                    cwd=cwd,
                    env=environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output if stdout is None else stdout,
                    stderr=output,
                    pass_fds=tuple(pass_fds),
                    # A terminal's Ctrl-C and hang-up reach whole process groups; the
                    # machine must outlive them for as long as its owner tears down.
                    start_new_session=True,
                )
            )
        self.pid = self._popen.pid

    def poll(self) -> int | None:
        """Its exit status (negative: the signal that killed it), or None while it runs."""
        return self._popen.poll()

    def wait(self, timeout_s: float) -> int | None:
        """Like ``poll``, after waiting for its end for at most ``timeout_s`` seconds."""
        if self._popen.poll() is None and hasattr(os, "pidfd_open"):
            try:
                pidfd = os.pidfd_open(self.pid)
            except OSError:
                pass  # an old kernel, or a strict sandbox: wait() below polls
            else:
                try:
                    wait_readable(pidfd, timeout_s)
                finally:
                    os.close(pidfd)
                return self._popen.poll()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._popen.wait(max(0.0, timeout_s))
        return None

    def kill(self) -> None:
        """End it at once, and see it ended."""
        if self.poll() is None:
            self._popen.kill()
        if self.wait(30) is None:
            raise SmolVMError(
                f"process {self.pid} did not end within 30 s of SIGKILL: it hangs in the kernel, "
                f"most likely on its disk; look at /proc/{self.pid}/stack",
                {"pid": self.pid, "argv": self.argv},
            )

    def output_tail(self, limit: int = 4000) -> str:
        """The last ``limit`` bytes of what it printed, as text."""
        try:
            with self._log.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(0, size - limit))
                return log.read().decode(errors="replace").strip()
        except FileNotFoundError:
            return ""


def processor_time_s(pid: int) -> float:
    """Seconds of processor time that a process has used so far; 0 if there is no way to tell."""
    total_ns = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        # Threads come and go, and some hosts do not count.
        with contextlib.suppress(OSError, ValueError, IndexError):
            total_ns += int(path.read_text().split()[0])
    return total_ns / 1e9


def _die_with_parent() -> list[str]:
    setpriv = find_setpriv()
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


def _confined(limits: Limits | None, *, drop_capabilities: bool) -> list[str]:
    setpriv = find_setpriv()
    if setpriv is None:
        return ["/bin/sh", "-c", f'{ulimits(limits)}exec "$@"', "sh"]
    rights = privileges(drop_capabilities=drop_capabilities)
    return [setpriv, "--pdeathsig", "KILL", *rights, "--", *still_ours(ulimits(limits))]


def still_ours(before: str = "") -> list[str]:
    """What comes before a command that has asked for a signal at its parent's death.

    Had we died before it was asked for, it would never come (prctl(2)). So the program, once it
    has been, looks who its parent is. ``before``: shell commands to do then.
    """
    script = f'[ "$PPID" = "$0" ] || exit; {before}exec "$@"'
    return ["/bin/sh", "-c", script, str(os.getpid())]


def wait_readable(descriptor: int, timeout_s: float) -> bool:
    """Wait until there is something to read, or the end of it; False if the time is up first."""
    return bool(_ready([descriptor], timeout_s))


def readable(sockets: Sequence[socket.socket], timeout_s: float) -> list[socket.socket]:
    """Those of ``sockets`` with something to read, or an end, after waiting until one has."""
    ready = _ready([sock.fileno() for sock in sockets], timeout_s)
    return [sock for sock in sockets if sock.fileno() in ready]


def _ready(descriptors: Sequence[int], timeout_s: float) -> set[int]:
    # Not select(), which fails for descriptors from 1024 on.
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(max(0.0, timeout_s) * 1000)}


class Deadline:
    """A moment that a wait must not pass: ``timeout_s`` seconds, 0 or more, from now.

    ``name`` is what the caller calls that number; ``SmolVMError`` if it is none.
    """

    def __init__(self, timeout_s: float, name: str = "timeout") -> None:
        if not isinstance(timeout_s, (int, float)) or not timeout_s >= 0:
            raise SmolVMError(f"{name}={timeout_s!r} is not valid: give seconds, 0 or more")
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def remaining_s(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self._end - time.monotonic())

    def passed(self) -> bool:
        return time.monotonic() >= self._end
