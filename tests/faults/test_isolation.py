"""What a guest can reach and what QEMU may do, tried on real ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_smolvm import SmolVM, VMConfig
from tests.conftest import changed, qemu_pids

SECRET = "a-secret-that-nobody-else-reads"


TRY_ALL = """
exec 2>/dev/null
ip -6 addr add fec0::99/64 dev eth0
ip -6 route add default via fec0::2
ip route add default via 10.0.2.2
while read kind address port; do
    case $kind in
        tcp) nc -w 2 $address $port </dev/null >/dev/null && echo reached $address $port & ;;
        udp) echo x | nc -u -w 2 $address $port & ;;
    esac
done </tries
nslookup example.org 10.0.2.3 | grep Name &
ping -c 1 -W 2 169.254.169.254 >/dev/null && echo an echo &
wait
echo done
"""


class Listeners:
    """Services of this host, over TCP and UDP, IPv4 and IPv6, that note whoever comes."""

    def __init__(self) -> None:
        self.met: list[str] = []
        self.tcp = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        self.port: int = self.tcp.getsockname()[1]
        self.udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        self.udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.udp.bind(("::", self.port))
        self._threads = [threading.Thread(target=run) for run in (self._accept, self._receive)]
        for thread in self._threads:
            thread.start()

    def _accept(self) -> None:
        while True:
            connection, address = self.tcp.accept()
            said = connection.recv(100)
            connection.close()
            if said == b"end":
                return
            self.met.append(f"tcp {address}")

    def _receive(self) -> None:
        while True:
            said, address = self.udp.recvfrom(100)
            if said == b"end":
                return
            self.met.append(f"udp {address}")

    def close(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(b"end")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"end", ("127.0.0.1", self.port))
        for thread in self._threads:
            thread.join()
        self.tcp.close()
        self.udp.close()


@pytest.fixture
def listeners() -> Iterator[Listeners]:
    listeners = Listeners()
    yield listeners
    listeners.close()


def own_addresses() -> list[str]:
    done = subprocess.run(["ip", "-j", "addr"], capture_output=True, check=True)
    return [address["local"] for link in json.loads(done.stdout) for address in link["addr_info"]]


def test_an_isolated_guest_reaches_nobody(
    guest: SmolVM, micro_config: VMConfig, listeners: Listeners
) -> None:
    own = own_addresses()
    assert "127.0.0.1" in own
    with socket.create_connection(("127.0.0.1", listeners.port)) as connection:
        connection.sendall(b"hello")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"hello", ("127.0.0.1", listeners.port))
    while len(listeners.met) < 2:
        threading.Event().wait(0.01)  # they are there, and would answer
    listeners.met.clear()
    named = ["10.0.2.2", "10.0.2.3", "10.0.2.4", "169.254.169.254", "127.0.0.1"]
    with SmolVM(micro_config) as another:
        port = int(re.findall(r"-p (\d+)", another.ssh_commands()["ssh"])[0])
        tries = [
            f"tcp {address} {number}"
            for address in {*own, *named, "fec0::2", "fec0::3", "fe80::2%eth0"}
            for number in (listeners.port, port, 22, 53, 80)
            if number != 22 or address not in ("127.0.0.1", "::1")  # its own SSH server
        ]
        tries += [f"udp {address} {listeners.port}" for address in [*own, *named, "fec0::2"]]
        guest.write_text("/tries", "".join(f"{line}\n" for line in tries))
        result = guest.run(TRY_ALL, timeout=200)
    assert result.stdout == "done\n"
    assert listeners.met == []


def test_qemu_is_confined(guest: SmolVM) -> None:
    (pid,) = [pid for pid in qemu_pids() if guest.vm_id in argv(pid)]
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) & ~(1 << 2 | 1 << 10) == 0
    limits = Path(f"/proc/{pid}/limits").read_text()
    data = re.search(r"Max data size\s+(\d+)", limits)
    files = re.search(r"Max file size\s+(\d+)", limits)
    assert data is not None
    assert int(data[1]) < 4 << 30
    assert files is not None
    assert int(files[1]) < 1 << 30
    assert re.search(r"Max core file size\s+0 ", limits)


def argv(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


@pytest.mark.parametrize("network", ["isolated", "nat"])
def test_no_secret_is_seen_in_the_list_of_processes(
    micro_config: VMConfig, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    monkeypatch.setenv("CI_TOKEN", SECRET)
    before = processes()
    config = changed(micro_config, env_vars={"PASSWORD": SECRET}, network=network)
    with SmolVM(config) as vm:
        assert vm.run("echo $PASSWORD").output == SECRET
        new = processes() - before
        assert new
        for pid in new:
            for name in ("cmdline", "environ"):
                try:
                    text = Path(f"/proc/{pid}/{name}").read_bytes()
                except OSError:
                    continue
                if b"pytest" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                    assert SECRET.encode() not in text, (pid, name, text)
                assert b"PRIVATE KEY" not in text


def processes() -> set[int]:
    return {int(path.name) for path in Path("/proc").glob("[0-9]*")}


@pytest.mark.parametrize("network", ["isolated", "nat"])
def test_no_other_user_may_look_at_a_vms_files(
    micro_config: VMConfig, no_vms: Path, network: str
) -> None:
    os.umask(before := os.umask(0))
    assert before != 0
    os.umask(0)  # the most careless of users
    try:
        with SmolVM(changed(micro_config, network=network), restore=False) as vm:
            vm.run("true")
            assert stat.S_IMODE(vm.directory.stat().st_mode) == 0o700
            open_to_others = [
                path.name
                for path in vm.directory.iterdir()
                if not path.is_symlink() and path.stat().st_mode & 0o077
            ]
            kept = vm.retain("to be looked at")
            open_to_others += [path.name for path in kept.iterdir() if path.stat().st_mode & 0o077]
    finally:
        os.umask(before)
    assert [name for name in open_to_others if name != "lock"] == []
    for key in (no_vms / "keys").iterdir():
        if not key.name.endswith(".pub"):
            assert stat.S_IMODE(key.stat().st_mode) & 0o077 == 0, key
    shutil.rmtree(kept)
