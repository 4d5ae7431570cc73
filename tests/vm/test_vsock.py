"""The guest's side of vsock, over the loopback that Linux has for it.

What it is for, a machine that has nothing else, cannot be had without KVM: tests/contract/ tries
the host's side of it.
"""

from __future__ import annotations

import base64
import json
import struct
import uuid
from collections.abc import Iterator

import pytest

from pytest_smolvm import SSH_BOOT_ARGS, ImageBuilder, SmolVM, VMConfig, waking
from pytest_smolvm.backends.vsock import AGENT_PORT, RELAY_PORT
from pytest_smolvm.images.guestfiles import COMPANION, WITHOUT_PCI
from pytest_smolvm.waking import Identity

_TALK = """
import base64, json, socket, sys, threading
out = {}

def connect(port):
    sock = socket.socket(socket.AF_VSOCK)
    sock.settimeout(20)
    sock.connect((socket.VMADDR_CID_LOCAL if hasattr(socket, "VMADDR_CID_LOCAL") else 1, port))
    return sock

def all_of(sock):
    data = b""
    while block := sock.recv(65536):
        data += block
    return data
"""


@pytest.fixture(scope="module")
def guest(state_dir: object) -> Iterator[SmolVM]:
    kernel, rootfs = ImageBuilder().build("debian")
    config = VMConfig(
        kernel_path=kernel,
        rootfs_path=rootfs,
        boot_args=f"{SSH_BOOT_ARGS} {WITHOUT_PCI}",
        backend="qemu",
    )
    with SmolVM(config, restore=False) as vm:
        vm.run("modprobe vsock_loopback").check()
        yield vm


def talk(guest: SmolVM, script: str) -> dict[str, object]:
    program = f"{_TALK}{script}\nprint(json.dumps(out))"
    return json.loads(guest.run(["python3", "-c", program], timeout=60).check().stdout)  # type: ignore[no-any-return]


def test_the_relay_leads_to_the_guests_own_ports(guest: SmolVM) -> None:
    said = talk(
        guest,
        f"""
ssh = connect({RELAY_PORT})
ssh.sendall((22).to_bytes(2, "little"))
out["ssh"] = ssh.recv(8).decode()
nobody = connect({RELAY_PORT})
nobody.sendall((9).to_bytes(2, "little"))
out["nobody"] = all_of(nobody).decode()
""",
    )
    assert said == {"ssh": "SSH-2.0-", "nobody": ""}


def test_the_relay_carries_all_of_both_directions_and_their_ends(guest: SmolVM) -> None:
    said = talk(
        guest,
        f"""
server = socket.create_server(("127.0.0.1", 0))
def answer():
    accepted, _ = server.accept()
    accepted.sendall(all_of(accepted)[::-1])
    accepted.close()
threading.Thread(target=answer).start()
data = bytes(range(256)) * 8000
sock = connect({RELAY_PORT})
sock.sendall(server.getsockname()[1].to_bytes(2, "little") + data)
sock.shutdown(socket.SHUT_WR)
out["whole"] = all_of(sock) == data[::-1]
""",
    )
    assert said == {"whole": True}


def test_many_relayed_connections_at_once_and_one_after_the_other(guest: SmolVM) -> None:
    said = talk(
        guest,
        f"""
server = socket.create_server(("127.0.0.1", 0), backlog=64)
def answer():
    while True:
        accepted, _ = server.accept()
        accepted.sendall(b"hello")
        accepted.close()
threading.Thread(target=answer, daemon=True).start()
def greet():
    sock = connect({RELAY_PORT})
    sock.sendall(server.getsockname()[1].to_bytes(2, "little"))
    return sock
out["greetings"] = 0
for _ in range(5):
    for sock in [greet() for _ in range(8)]:
        out["greetings"] += all_of(sock) == b"hello"
        sock.close()
""",
    )
    assert said == {"greetings": 40}
    # The dead are buried with the next one; none but the last few wait for that.
    assert int(guest.run("ps -A -o stat= | grep -c '^Z' || true").output) < 10


def test_the_agent_waits_through_lost_connections_and_makes_another_machine(
    guest: SmolVM,
) -> None:
    name = f"woken-{uuid.uuid4().hex[:6]}"
    body = waking._body(Identity(name, machine_id=None, boot_id=None))
    message = waking._MAGIC + struct.pack("<I", len(body)) + body
    before = guest.run("hostname").output
    guest.run(
        f"setsid {COMPANION}/agent vsock {COMPANION}/ssh-on-port < /dev/null > /dev/null 2>&1 &"
    ).check()
    said = talk(
        guest,
        f"""
import time
message = base64.b64decode("{base64.b64encode(message).decode()}")
def connect_soon():
    for _ in range(100):
        try:
            return connect({AGENT_PORT})
        except OSError:
            time.sleep(0.1)
first = connect_soon()
out["ready"] = first.recv(64).decode()
first.close()
half = connect({AGENT_PORT})
half.sendall(message[:40])
half.close()
gone = connect({AGENT_PORT})
gone.sendall(message)
gone.recv(1)
gone.close()
last = connect({AGENT_PORT})
last.sendall(message)
out["done"] = last.recv(1).decode()
last.sendall(b"G")
out["ssh"] = last.recv(8).decode()
""",
    )
    try:
        assert said == {"ready": "SMOLVM-READY\n", "done": "T", "ssh": "SSH-2.0-"}
        assert guest.run("hostname").output == name
    finally:
        guest.run(f"hostname {before}").check()
