"""The host's side of the guest's agent: putting a guest to sleep, and waking it as another.

What is spoken on the port is told of in ``images/agent/agent.c``.
"""

from __future__ import annotations

import os
import shlex
import socket
import struct
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pytest_smolvm import envvars
from pytest_smolvm.backends.base import PORT_NAME, Machine
from pytest_smolvm.errors import BackendError, OperationTimeoutError
from pytest_smolvm.guest import Guest
from pytest_smolvm.images.guestfiles import COMPANION
from pytest_smolvm.process import Deadline, wait_readable

_READY = b"SMOLVM-READY\n"
_MAGIC = b"SMOLVM-WAKE\n"
_SEED_BYTES = 64
_CLOCK_WITHIN_S = 0.02
_CLOCK_TRIES = 20
_ANSWER_PATIENCE_S = 2.0
_RUN = COMPANION
_STEPS = {
    1: "a message that it does not understand",
    2: "seeding the random generator",
    3: "the host name",
    4: "writing a file",
    5: "the clock",
}


@dataclass(frozen=True)
class Identity:
    """Who a woken guest is."""

    host_name: str
    env_vars: Mapping[str, str] | None = None
    """What its environment file is to hold; None: what it holds already."""
    machine_id: uuid.UUID | None = field(default_factory=uuid.uuid4)
    boot_id: uuid.UUID | None = field(default_factory=uuid.uuid4)
    """Each None: it stays what it was."""


def lay_down(
    guest: Guest, machine: Machine, agent: str, deadline: Deadline, *, has_boot_id: bool
) -> None:
    """Bring the guest to where a saved state of it can be woken: its agent waits on the port.

    All of our connections are closed then. The kernel makes up its boot id when somebody
    first asks, and never again: once it may have (``has_boot_id``), a file that the agent can
    write takes its place.
    """
    guest.disconnect()
    ssh_on_port = str(PurePosixPath(agent).with_name("ssh-on-port"))
    # What a command has to look up on the disk is looked up here, once for all.
    guest.ask("true", max(0.1, deadline.remaining_s()), shell="login")
    script = f"""
PATH="$PATH:{_RUN}/bin"
mkdir -p {_RUN} && cd {_RUN} || exit 1
[ ! -r agent.pid ] || {{ read -r pid < agent.pid && kill -9 -- "-$pid" 2> /dev/null; }}
port=
for entry in /sys/class/virtio-ports/*; do
    read -r name < "$entry/name" && [ "$name" = {PORT_NAME} ] && port="/dev/${{entry##*/}}"
done
[ -n "$port" ] || {{ [ ! -c /dev/vsock ] || port=vsock; }}
[ -n "$port" ] || {{ echo "there is neither a port {PORT_NAME} nor /dev/vsock" >&2; exit 1; }}
if {"[ ! -e boot_id ]" if has_boot_id else "false"}; then
    cat /proc/sys/kernel/random/boot_id > boot_id && chmod 444 boot_id &&
        mount --bind {_RUN}/boot_id /proc/sys/kernel/random/boot_id
fi
sync
setsid {shlex.quote(agent)} "$port" {shlex.quote(ssh_on_port)} < /dev/null > /dev/null 2>&1 &
echo $! > agent.pid
"""
    done = guest.ask(script, max(0.1, deadline.remaining_s()))
    if not done.ok:
        raise BackendError(f"the guest's agent could not be started: {done.describe()}")
    heard = b""
    port = machine.open_port(deadline)
    while _READY not in heard:
        heard = heard[-len(_READY) :] + _read(port, 4096, "to be ready", deadline)
    guest.disconnect()


def wake(machine: Machine, identity: Identity, deadline: Deadline) -> None:
    """Resume a machine whose agent waits; when this returns, the guest is ``identity``.

    Its random generator shares nothing with that of any other guest, its clock is right, and
    the port belongs to SSH. Raises ``BackendError`` and ``OperationTimeoutError``.
    """
    body = _body(identity)
    try:
        machine.resume_with(_MAGIC + struct.pack("<I", len(body)) + body, deadline)
        port = machine.port
        port.settimeout(max(0.01, deadline.remaining_s()))
        try:
            _hear_all(port, 1, deadline)
            _set_clock(port, deadline)
            port.sendall(b"G")
        finally:
            port.settimeout(None)
    except TimeoutError:
        raise OperationTimeoutError("talking to the guest's agent", deadline.timeout_s) from None
    except OSError as error:
        raise BackendError(f"the guest's agent cannot be talked to: {error}") from error


def _set_clock(port: socket.socket, deadline: Deadline) -> None:
    # What we send is right when the guest gets it; so ask for that to be soon.
    for _ in range(_CLOCK_TRIES):
        sent = time.monotonic()
        _send_time(port)
        _hear_all(port, 1, deadline)
        if time.monotonic() - sent < _CLOCK_WITHIN_S:
            return


def _send_time(port: socket.socket) -> None:
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    port.sendall(b"S" + struct.pack("<qI", seconds, nanoseconds))


def _hear_all(port: socket.socket, unanswered: int, deadline: Deadline) -> None:
    """Hear the answer to each message that was sent.

    A guest was seen to sleep on what it had been sent, once in hundreds of times on a busy host:
    word of it had been lost. So it is sent another message, which brings word of both.
    """
    while unanswered:
        if wait_readable(port.fileno(), min(_ANSWER_PATIENCE_S, deadline.remaining_s())):
            _expect_done(port, deadline)
            unanswered -= 1
        elif deadline.passed():
            raise OperationTimeoutError("waiting for the guest's agent", deadline.timeout_s)
        else:
            _send_time(port)
            unanswered += 1


def _expect_done(port: socket.socket, deadline: Deadline) -> None:
    answer = _read(port, 1, "for the guest's agent", deadline)
    if answer == b"E":
        step = _read(port, 1, "for the guest's agent", deadline)[0]
        number = _read(port, 1, "for the guest's agent", deadline)[0]
        reason = f": {os.strerror(number)}" if number else ""
        raise BackendError(
            f"the guest's agent failed at {_STEPS.get(step, f'step {step}')}{reason}"
        )
    if answer != b"T":
        raise BackendError(f"the guest's agent answered {answer!r}")


def _read(port: socket.socket, limit: int, what: str, deadline: Deadline) -> bytes:
    if not wait_readable(port.fileno(), deadline.remaining_s()):
        raise OperationTimeoutError(f"waiting {what}", deadline.timeout_s)
    data = port.recv(limit)
    if not data:
        raise BackendError("the machine closed the port: it ended")
    return data


def _body(identity: Identity) -> bytes:
    name = identity.host_name.encode()
    # Path, mode, whether to make it, contents.
    files: list[tuple[str, int, bool, str]] = []
    if identity.machine_id:
        # A guest that has none needs none.
        files.append(("/etc/machine-id", 0o444, False, f"{identity.machine_id.hex}\n"))
    if identity.boot_id:
        files.append((f"{_RUN}/boot_id", 0o444, False, f"{identity.boot_id}\n"))
    if identity.env_vars:
        files.append((envvars.ENV_FILE, 0o644, True, envvars.render(identity.env_vars)))
    body = os.urandom(_SEED_BYTES) + struct.pack("<B", len(name)) + name
    body += struct.pack("<H", len(files))
    for path, mode, make, text in files:
        where, data = path.encode(), text.encode()
        body += struct.pack("<BHH", make, mode, len(where)) + where
        body += struct.pack("<I", len(data)) + data
    return body
