"""network="nat" on every backend: the guest goes out, and finds no way to this host."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_smolvm import SmolVM, SmolVMError, VMConfig
from pytest_smolvm.backends import nat
from pytest_smolvm.backends.base import Backend

# Another network for each process that runs these tests: two on one would not get their answers.
_NETWORK = f"10.213.{os.getpid() >> 6 & 255}"
_FIRST = (os.getpid() & 63) * 4
OUTSIDE, HOST_SIDE = f"{_NETWORK}.{_FIRST + 2}", f"{_NETWORK}.{_FIRST + 1}"


@pytest.fixture(scope="module")
def outside() -> Iterator[int]:
    """A server on another host: in a network namespace, at ``OUTSIDE``; its port."""
    if os.geteuid() != 0:
        pytest.skip("another host, in a network namespace, takes root")
    name = f"smolvm-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        ip("netns", "add", name)
        stack.callback(ip, "netns", "delete", name)
        ip("link", "add", f"v{os.getpid()}", "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("addr", "add", f"{HOST_SIDE}/30", "dev", f"v{os.getpid()}")
        ip("link", "set", f"v{os.getpid()}", "up")
        ip("-n", name, "addr", "add", f"{OUTSIDE}/30", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "link", "set", "lo", "up")
        script = (
            "import http.server\n"
            f"server = http.server.HTTPServer(('{OUTSIDE}', 0), "
            "http.server.SimpleHTTPRequestHandler)\n"
            "print(server.server_port, flush=True)\n"
            "server.serve_forever()"
        )
        server = subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        stack.callback(lambda: (server.kill(), server.communicate()))
        assert server.stdout is not None
        yield int(server.stdout.readline())


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture(scope="module")
def natted(backend: Backend, micro: tuple[Path, Path]) -> Iterator[SmolVM]:
    config = VMConfig(
        kernel_path=micro[0],
        rootfs_path=micro[1],
        boot_args="console=ttyS0 init=/init",
        mem_size_mib=256,
        network="nat",
    )
    with SmolVM(config) as vm:
        yield vm


@pytest.fixture
def host_service() -> Iterator[int]:
    """A service of this host, on all of its addresses; its port."""
    server = http.server.HTTPServer(("0.0.0.0", 0), http.server.SimpleHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def reaches(vm: SmolVM, address: str, port: int) -> bool:
    return vm.run(f"nc -w 2 {address} {port} < /dev/null > /dev/null 2>&1").ok


def test_a_guest_goes_out(outside: int, natted: SmolVM) -> None:
    page = natted.run(f"wget -q -O - http://{OUTSIDE}:{outside}/").check()
    assert "Directory listing" in page.stdout


def test_no_address_leads_to_a_service_of_the_host(
    outside: int, natted: SmolVM, host_service: int
) -> None:
    assert outside
    addresses = json.loads(
        subprocess.run(["ip", "-j", "-4", "addr"], capture_output=True, check=True).stdout
    )
    own = [a["local"] for link in addresses for a in link["addr_info"]]
    for address in own:
        # It is there, and would answer.
        socket.create_connection((address, host_service), 5).close()
    assert "127.0.0.1" in own
    inside = ["10.0.2.2", "10.0.2.3", "10.0.2.100", "10.0.3.2", "10.0.3.3"]
    inside += [nat.ADDRESS, "127.0.0.1"]
    # The host's side of the wire to that other host came after the VM's start, or before it.
    with SmolVM(natted.config.model_copy(update={"vm_id": "nat-later"})) as vm:
        assert reaches(vm, OUTSIDE, outside), "there is a way out"
        found = [address for address in {*own, *inside} if reaches(vm, address, host_service)]
    assert found == []


def test_ipv6_leads_nowhere(natted: SmolVM) -> None:
    assert natted.run("cat /proc/net/if_inet6").stdout.count("\n") <= 2
    assert "Usage" not in natted.run("ip -6 route show default").stdout
    assert natted.run("ip -6 route show default").output == ""


def test_the_host_has_its_ways_in(natted: SmolVM) -> None:
    natted.run("mkdir -p /www && echo hello > /www/index.html && httpd -p 8080 -h /www").check()
    natted.wait_for_port(8080)
    port = natted.expose_local(8080)
    url = f"http://127.0.0.1:{port}/"
    assert urllib.request.urlopen(url, timeout=10).read() == b"hello\n"
    with pytest.raises(SmolVMError, match=f"port {port} of 127.0.0.1 cannot be forwarded"):
        natted.expose_local(8080, port)
    natted.unexpose_local(port)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=10)
    assert natted.expose_local(8080, port) == port, "it is free again"
    natted.unexpose_local(port)
    taken = socket.create_server(("127.0.0.1", 0))
    with taken, pytest.raises(SmolVMError, match="in use, or not allowed"):
        natted.expose_local(8080, taken.getsockname()[1])


def test_commands_side_by_side_and_files(natted: SmolVM, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(os.urandom(3 << 20))
    natted.put(tmp_path / "data", "/tmp/data")
    natted.get("/tmp/data", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "data").read_bytes()


def test_it_is_restored_like_any_other(natted: SmolVM, outside: int) -> None:
    with SmolVM(natted.config.model_copy(update={"vm_id": "nat-again"})) as vm:
        assert vm.restored
        assert reaches(vm, OUTSIDE, outside)
        template = vm.snapshot()
        # It has met its gateway, and goes on as if that were the same.
        with SmolVM.from_template(template) as other:
            assert reaches(other, OUTSIDE, outside)
        template.delete()
        vm.reboot()
        assert reaches(vm, OUTSIDE, outside)


def slirps(directory: Path) -> list[int]:
    """The processes that lead out of a VM, by the folder that they work in."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "comm").read_text() == "slirp4netns\n" and (path / "cwd").readlink() == (
                directory.resolve()
            ):
                found.append(int(path.name))
    return found


def test_nothing_is_left_of_it(natted: SmolVM) -> None:
    with SmolVM(natted.config.model_copy(update={"vm_id": "nat-ends"})) as vm:
        directory = vm.directory
        assert len(slirps(directory)) == 1
    assert slirps(directory) == []
    assert not directory.exists()
