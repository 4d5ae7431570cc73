"""A machine that may go out, but not to this host: in a network namespace of its own.

QEMU's user network opens its connections as a process of this host, and so reaches whatever the
host does, its loopback above all. A machine with ``network="nat"`` therefore runs in a network
namespace, in which there is no loopback but its own. slirp4netns leads out of that, with the way to
the host's loopback closed; the host's other addresses have no route there. Neither takes root.

QEMU has a network of its own for the guest within. The way in is the same: slirp4netns listens on
the host's 127.0.0.1 and leads into the namespace, where QEMU listens and leads to the guest.

A backend that takes TAP devices has one there, on which the guest meets what it would meet on
QEMU's network: what it sends is routed, past the host's addresses, to slirp4netns.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_smolvm import usernet
from pytest_smolvm.backends.base import MachineSpec
from pytest_smolvm.confinement import privileges
from pytest_smolvm.errors import BackendError, OperationTimeoutError, SmolVMError
from pytest_smolvm.process import (
    Deadline,
    MachineProcess,
    ToolError,
    find_tool,
    run_tool,
    still_ours,
    wait_readable,
)
from pytest_smolvm.statedir import write_atomically

# Beside the guest's own network, if QEMU has that within: see usernet.
_NETWORK = "10.0.3.0/24"
ADDRESS = "10.0.3.100"
"""The machine's address in its namespace: slirp4netns's default."""
_NAME_SERVER = "10.0.3.3"

_SOCKET = "network.sock"
_ANSWER_TIMEOUT_S = 10.0
_FREE_PORT_TRIES = 8

# Runs in the new namespaces, and becomes the machine. What slirp4netns needs is done from
# outside, once the first line has been written, and is done when there is a line to read.
_ENTER = """
echo there > "/proc/self/fd/$ready"
read -r go < "/proc/self/fd/$go"
ip link set lo up
for address in $unreachable; do
    ip route add unreachable "$address"
done
if [ -n "$tap" ]; then
    # Each side takes this namespace for the other: proxy_arp, in networking/ip-sysctl.rst.
    ip tuntap add dev "$tap" mode tap user "$(id -u)"
    # The same for each: a guest that was saved remembers it.
    ip link set "$tap" address "$gateway_mac"
    echo 1 > /proc/sys/net/ipv4/ip_forward
    for device in tap0 "$tap"; do
        echo 1 > "/proc/sys/net/ipv4/conf/$device/proxy_arp"
        echo 0 > "/proc/sys/net/ipv4/conf/$device/send_redirects"
    done
    ip link set "$tap" up
    ip route add "$guest" dev "$tap"
fi
mount --bind resolv.conf /etc/resolv.conf
exec "$@"
"""


class Nat:
    """The way out of one machine, and into it."""

    def __init__(self, directory: Path, tap: str = "") -> None:
        """``tap``: the name of a TAP device for the machine; empty: it has a network within."""
        self._directory = directory
        self._tap = tap
        self._network = usernet.NETWORK if tap else _NETWORK
        self._slirp4netns = find_tool("slirp4netns", "slirp4netns")
        self._ids: dict[int, int] = {}
        self._process: MachineProcess | None = None
        self._ready, self._told_ready = os.pipe()
        self._wait_to_go, self._go = os.pipe()
        self._open = {self._ready, self._told_ready, self._wait_to_go, self._go}

    @property
    def inherited(self) -> tuple[int, int]:
        """The descriptors that the machine's process must inherit."""
        return self._told_ready, self._wait_to_go

    def wrap(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs ``argv`` in namespaces of its own."""
        write_atomically(self._directory / "resolv.conf", f"nameserver {_NAME_SERVER}\n".encode())
        variables = {
            "ready": str(self._told_ready),
            "go": str(self._wait_to_go),
            "unreachable": " ".join(_addresses_of_host()),
            "tap": self._tap,
            "guest": usernet.GUEST_ADDRESS,
            "gateway_mac": usernet.GATEWAY_MAC,
            # Administrators' programs, which an ordinary user's PATH may leave out.
            "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin",
        }
        namespaces = ["--net", "--mount"]
        # Asked for here, since a new user namespace takes it back (prctl(2)).
        rights = ["--pdeathsig", "KILL", *privileges()]
        if os.geteuid() != 0:
            namespaces += ["--user", "--map-root-user"]
            # Within the namespace this user could change the routes again.
            rights += ["--inh-caps=-all", "--bounding-set=-all"]
        return [
            *("env", *(f"{name}={value}" for name, value in variables.items())),
            *(find_tool("unshare", "util-linux"), *namespaces, "--"),
            *("sh", "-ec", _ENTER, "sh"),
            *(find_tool("setpriv", "util-linux"), *rights, "--"),
            *still_ours(),
            *argv,
        ]

    def attach(self, machine: MachineProcess, deadline: Deadline) -> None:
        """Lead out of the namespaces of a machine that was started with ``wrap``."""
        # Ours would keep it from being noticed that the machine's end is closed.
        self._close(*self.inherited)
        if not wait_readable(self._ready, deadline.remaining_s()):
            raise OperationTimeoutError("making a network namespace", deadline.timeout_s)
        if not os.read(self._ready, 64):
            machine.wait(_ANSWER_TIMEOUT_S)
            raise BackendError(
                "network='nat' takes a network namespace, which cannot be made here: "
                f"{machine.output_tail() or 'the process ended'}. As an ordinary user that takes "
                "user namespaces (sysctl kernel.unprivileged_userns_clone, or "
                "kernel.apparmor_restrict_unprivileged_userns)",
            )
        configured, tell_configured = os.pipe()
        try:
            user_namespace = [f"--userns-path=/proc/{machine.pid}/ns/user"]
            self._process = MachineProcess(
                [
                    self._slirp4netns,
                    *("--configure", "--mtu=65520", f"--cidr={self._network}"),
                    "--disable-host-loopback",
                    f"--ready-fd={tell_configured}",
                    f"--api-socket={_SOCKET}",
                    *(user_namespace if os.geteuid() != 0 else ()),
                    *("--netns-type=path", f"/proc/{machine.pid}/ns/net", "tap0"),
                ],
                cwd=self._directory,
                log=self._directory / "network.log",
                pass_fds=[tell_configured],
                drop_capabilities=False,  # it enters the machine's namespaces
            )
            os.close(tell_configured)
            tell_configured = -1
            if not wait_readable(configured, deadline.remaining_s()):
                raise OperationTimeoutError("waiting for slirp4netns", deadline.timeout_s)
            if not os.read(configured, 64):
                self._process.wait(_ANSWER_TIMEOUT_S)
                raise BackendError(
                    "slirp4netns, which network='nat' takes, failed (it needs a /dev/net/tun that "
                    f"this user may open): {self._process.output_tail()}"
                )
        finally:
            os.close(configured)
            if tell_configured >= 0:
                os.close(tell_configured)
        os.write(self._go, b"go\n")

    def forward(self, inner_port: int, host_port: int) -> int:
        """Let the host's 127.0.0.1:``host_port`` (0: any) lead to the machine's ``inner_port``."""
        if host_port:
            self._add(inner_port, host_port)
            return host_port
        for _ in range(_FREE_PORT_TRIES):
            # slirp4netns wants to be told; somebody else may be quicker.
            with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
                port: int = server.getsockname()[1]
            with contextlib.suppress(SmolVMError):
                self._add(inner_port, port)
                return port
        raise SmolVMError("no free port of 127.0.0.1 could be forwarded")

    def unforward(self, host_port: int) -> None:
        """Take back what ``forward`` did."""
        self._ask("remove_hostfwd", {"id": self._ids.pop(host_port)})

    def close(self) -> None:
        """End it; the machine is to be gone by then."""
        self._close(*self._open)
        if self._process is not None:
            self._process.kill()

    def _close(self, *descriptors: int) -> None:
        for descriptor in descriptors:
            if descriptor in self._open:
                self._open.discard(descriptor)
                os.close(descriptor)

    def _add(self, inner_port: int, host_port: int) -> None:
        where = {"host_addr": "127.0.0.1", "host_port": host_port, "guest_port": inner_port}
        answer = self._ask("add_hostfwd", {"proto": "tcp", **where})
        self._ids[host_port] = answer["id"]

    def _ask(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """One question to slirp4netns: JSON there, JSON back, a connection for each."""
        folder = os.open(self._directory, os.O_RDONLY)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(_ANSWER_TIMEOUT_S)
                # By way of a descriptor: a socket's path may have 107 bytes, ours may be longer.
                connection.connect(f"/proc/self/fd/{folder}/{_SOCKET}")
                connection.sendall(
                    json.dumps({"execute": command, "arguments": arguments}).encode()
                )
                connection.shutdown(socket.SHUT_WR)
                data = b""
                while block := connection.recv(4096):
                    data += block
        except OSError as error:
            raise BackendError(f"slirp4netns does not answer: {error}") from error
        finally:
            os.close(folder)
        answer = json.loads(data)
        if "error" in answer:
            raise SmolVMError(str(answer["error"].get("desc", answer["error"])))
        result: dict[str, Any] = answer.get("return") or {}
        return result


def nat_for(spec: MachineSpec, tap: str = "") -> Nat | None:
    """The way out of that machine; None: it has none."""
    if spec.network == "isolated":
        return None
    try:
        return Nat(spec.directory, tap)
    except ToolError as error:
        raise BackendError(
            f"network='nat' cannot be had: {error.message}", {"network": spec.network}
        ) from error


def _addresses_of_host() -> list[str]:
    """This host's own IPv4 addresses, but for the loopback's, of which each namespace has one."""
    text = run_tool([find_tool("ip", "iproute2"), "-json", "-4", "addr"], timeout_s=10)
    found = [entry["local"] for link in json.loads(text) for entry in link.get("addr_info", ())]
    # One may be on several interfaces.
    return sorted({address for address in found if not address.startswith("127.")})
