"""The bare minimum that each figure is measured against: QEMU and paramiko, nothing else."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

import paramiko

from pytest_smolvm import VMConfig
from pytest_smolvm.backends import choose
from pytest_smolvm.backends.base import MachineSpec
from pytest_smolvm.backends.qemu_args import qemu_argv
from pytest_smolvm.disks import create_overlay
from pytest_smolvm.keys import library_key_pair
from pytest_smolvm.store import Store

_BOOT_TIMEOUT_S = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command_line(
    config: VMConfig, store: Store, folder: Path, port: int, monitor: int
) -> list[str]:
    """The very command line that the library starts, but for a port chosen beforehand."""
    backend = choose(store)
    disk = create_overlay(config.rootfs_path, folder / "bare.qcow2")
    spec = MachineSpec(
        vm_id="bare",
        directory=folder,
        kernel=config.kernel_path,
        initrd=config.effective_initrd_path(),
        boot_args=config.boot_args,
        vcpu_count=config.vcpu_count,
        mem_size_mib=config.mem_size_mib,
        disk=disk,
        network="isolated",
        accelerator=backend.accelerator,
        console=folder / "bare.console",
        machine_log=folder / "bare.log",
    )
    argv = qemu_argv(spec, backend.architecture, binary=backend.binary, monitor_fd=monitor)  # type: ignore[attr-defined]
    return [word.replace("tcp:127.0.0.1:0-", f"tcp:127.0.0.1:{port}-") for word in argv]


class BareGuest:
    """QEMU started by hand, a login over a socket with TCP_NODELAY."""

    def __init__(self, config: VMConfig, store: Store, folder: Path) -> None:
        key = paramiko.Ed25519Key(filename=str(library_key_pair(store).private_path))
        ours, theirs = socket.socketpair()
        port = free_port()
        argv = command_line(config, store, folder, port, theirs.fileno())
        began = time.perf_counter()
        self.process = subprocess.Popen(argv, pass_fds=[theirs.fileno()])
        theirs.close()
        self._monitor = ours
        sock = self._wait_for_banner(port)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.transport = paramiko.Transport(sock)
        self.transport.start_client(timeout=60)
        self.transport.auth_publickey("root", key)
        self.seconds = time.perf_counter() - began

    def _wait_for_banner(self, port: int) -> socket.socket:
        end = time.monotonic() + _BOOT_TIMEOUT_S
        while time.monotonic() < end and self.process.poll() is None:
            sock = socket.socket()
            # QEMU accepts before the guest listens: an early attempt is lost.
            sock.settimeout(0.1)
            try:
                sock.connect(("127.0.0.1", port))
                if sock.recv(1, socket.MSG_PEEK):
                    sock.settimeout(None)
                    return sock
            except OSError:
                pass
            sock.close()
            time.sleep(0.005)
        self.process.kill()
        raise SystemExit(f"the bare guest did not boot; QEMU's status: {self.process.wait()}")

    def run(self, command: str) -> bytes:
        channel = self.transport.open_session()
        channel.exec_command(command)
        output = channel.makefile().read()
        channel.recv_exit_status()
        channel.close()
        return bytes(output)

    def end(self) -> None:
        self.transport.close()
        self.process.kill()
        self.process.wait()
        self._monitor.close()
