"""Two hosts beside this one: network namespaces, each with a name and an SSH server of its own.

They share this machine's files. All traffic stays in the namespaces, which end
with the ``with`` statement that made them. Takes root.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PORT = 2222


@dataclass(frozen=True)
class Host:
    """A host that one reaches by SSH from the controller's namespace."""

    name: str
    state_dir: Path
    work_dir: Path
    ssh_config: Path

    @property
    def tx(self) -> str:
        """What ``--tx`` takes."""
        return "//".join(
            [
                f"ssh={self.name}",
                f"ssh_config={self.ssh_config}",
                f"python={sys.executable}",
                f"chdir={self.work_dir}",
            ]
        )


@dataclass(frozen=True)
class Hosts:
    """``command`` is run in the controller's namespace."""

    controller: str
    others: list[Host]

    def command(self, *argv: str) -> list[str]:
        return ["ip", "netns", "exec", self.controller, *argv]


def run(line: str) -> str:
    done = subprocess.run(shlex.split(line), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    prefix = f"smolvm-{secrets.token_hex(3)}"
    controller = f"{prefix}-ctl"
    config = folder / "ssh_config"
    run(f"ssh-keygen -q -t ed25519 -N '' -f {folder / 'id'}")
    with contextlib.ExitStack() as cleanup:
        _add_namespace(controller, cleanup)
        hosts = []
        for number, letter in enumerate("ab"):
            name = f"{prefix}-{letter}"
            _add_namespace(name, cleanup)
            run(f"ip -n {controller} link add veth{letter} type veth peer name eth0 netns {name}")
            run(f"ip -n {controller} addr add 10.77.{number}.1/24 dev veth{letter}")
            run(f"ip -n {name} addr add 10.77.{number}.2/24 dev eth0")
            run(f"ip -n {controller} link set veth{letter} up")
            run(f"ip -n {name} link set eth0 up")
            host = Host(name, folder / name / "state", folder / name / "work", config)
            host.state_dir.mkdir(parents=True)
            host.work_dir.mkdir()
            _serve(host, f"10.77.{number}.2", folder, cleanup)
            hosts.append(host)
        yield Hosts(controller, hosts)


def _add_namespace(name: str, cleanup: contextlib.ExitStack) -> None:
    run(f"ip netns add {name}")
    cleanup.callback(run, f"ip netns del {name}")
    run(f"ip -n {name} link set lo up")


def _serve(host: Host, address: str, folder: Path, cleanup: contextlib.ExitStack) -> None:
    home = folder / host.name / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    (home / ".ssh" / "authorized_keys").write_text((folder / "id.pub").read_text())
    key = folder / host.name / "host_key"
    told = run(f"dropbearkey -t ed25519 -f {key}")
    public = next(line for line in told.splitlines() if line.startswith("ssh-ed25519"))
    with (folder / "known_hosts").open("a") as known:
        known.write(f"[{address}]:{_PORT} {public}\n")
    with (folder / "ssh_config").open("a") as config:
        config.write(
            f"Host {host.name}\n HostName {address}\n Port {_PORT}\n User root\n"
            f" IdentityFile {folder / 'id'}\n IdentitiesOnly yes\n BatchMode yes\n"
            f" UserKnownHostsFile {folder / 'known_hosts'}\n StrictHostKeyChecking yes\n"
        )
    # The keys that may log in are where every root's are; here, only in this mount namespace.
    ssh_dir = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".ssh"
    if not ssh_dir.exists():
        ssh_dir.mkdir(mode=0o700)
        cleanup.callback(ssh_dir.rmdir)
    server = f"dropbear -F -E -e -s -r {key} -p {address}:{_PORT} -P {folder / host.name / 'pid'}"
    script = (
        f"hostname {host.name} && mount --bind {home / '.ssh'} {ssh_dir} "
        f"&& SMOLVM_STATE_DIR={host.state_dir} HOST_STATE={host.state_dir} exec {server}"
    )
    with (folder / host.name / "sshd.log").open("wb") as log:
        daemon = subprocess.Popen(
            ["ip", "netns", "exec", host.name, "unshare", "--uts", "sh", "-c", script],
            stdout=log,
            stderr=log,
        )
    cleanup.callback(_end, daemon)
    deadline = time.monotonic() + 30
    while b"Not backgrounding" not in (said := (folder / host.name / "sshd.log").read_bytes()):
        assert daemon.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.02)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    daemon.wait(30)


def why_not() -> str:
    """Why there can be no hosts here; empty: there can."""
    if os.geteuid() != 0:
        return "network namespaces of one's own take root"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, check=False
    )
    return f"namespaces cannot be made: {tried.stderr!r}" if tried.returncode else ""
