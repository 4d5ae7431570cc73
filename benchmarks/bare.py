"""The bare minimum that each figure is measured against: QEMU and paramiko, nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko

from pytest_smolvm import VMConfig
from pytest_smolvm.backends import choose
from pytest_smolvm.backends.base import MachineSpec, MemoryFile
from pytest_smolvm.backends.qemu_args import qemu_argv
from pytest_smolvm.disks import create_overlay, link_layer
from pytest_smolvm.images.guestfiles import SSH_SIGN
from pytest_smolvm.keys import library_key_pair
from pytest_smolvm.store import Store
from pytest_smolvm.templates import Template

_BOOT_TIMEOUT_S = 60
CONSOLE = "bare.console"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Setting:
    """All that is ready before the clock runs: key, disk, the library's own command line."""

    def __init__(
        self, config: VMConfig, store: Store, folder: Path, template: Template | None = None
    ) -> None:
        self.key = paramiko.Ed25519Key(filename=str(library_key_pair(store).private_path))
        self.config = config
        self.folder = folder
        self.template = template
        self._backend = choose(store)
        layers = [link_layer(layer, folder) for layer in template.layers] if template else []
        self._empty = folder / "empty.qcow2"
        self._disk = create_overlay(config.rootfs_path, self._empty, layers)
        self._number = 0
        self.over_tcp = False
        """Whether a restored guest is met at its network, as one that booted is."""

    @contextlib.contextmanager
    def command_line(self, port: int, monitor_fd: int, port_fd: int) -> Iterator[list[str]]:
        """For one machine, on a new disk: a copy of an empty one."""
        self._number += 1
        (self.folder / CONSOLE).unlink(missing_ok=True)
        disk = self.folder / f"{self._number}.qcow2"
        shutil.copyfile(self._empty, disk)
        template = self.template
        spec = MachineSpec(
            vm_id="bare",
            directory=self.folder,
            kernel=self.config.kernel_path,
            initrd=self.config.effective_initrd_path(),
            boot_args=self.config.boot_args,
            vcpu_count=self.config.vcpu_count,
            mem_size_mib=self.config.mem_size_mib,
            disk=self._disk,
            network="isolated",
            accelerator=self._backend.accelerator,
            console=self.folder / CONSOLE,
            machine_log=self.folder / "bare.log",
            memory=MemoryFile(template.path / "memory", shared=False) if template else None,
            state=template.path / "state" if template else None,
        )
        backend: Any = self._backend
        argv = qemu_argv(
            spec,
            backend.architecture,
            binary=backend.binary,
            monitor_fd=monitor_fd,
            port_fd=port_fd,
            console_fd=-1,
        )
        ours = {
            "tcp:127.0.0.1:0-": f"tcp:127.0.0.1:{port}-",
            str(self._empty): str(disk),
            "socket,id=console,fd=-1": f"file,id=console,path={spec.console}",
        }
        for theirs, own in ours.items():
            argv = [word.replace(theirs, own) for word in argv]
        yield argv
        disk.unlink()


class BareGuest:
    """QEMU started by hand, and a login."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._stack = contextlib.ExitStack()
        began = time.perf_counter()
        self._monitor, monitor = socket.socketpair()
        self._port, port = socket.socketpair()
        over_tcp = setting.template is None or setting.over_tcp
        tcp_port = free_port() if over_tcp else 0
        argv = self._stack.enter_context(
            setting.command_line(tcp_port, monitor.fileno(), port.fileno())
        )
        descriptors = [monitor.fileno(), port.fileno()]
        state = None
        if setting.template:
            state = (setting.template.path / "state").open("rb")
            descriptors.append(state.fileno())
        self.process = subprocess.Popen(argv, pass_fds=descriptors)
        monitor.close()
        port.close()
        if state:
            self._resume(state.fileno())
            state.close()
        if over_tcp:
            if not setting.template:
                self._wait_for_sign(setting.folder / CONSOLE)
            sock = self._wait_for_banner(tcp_port)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            sock = self._wake()
        self.transport = paramiko.Transport(sock)
        self.transport.start_client(timeout=60)
        self.transport.auth_publickey("root", setting.key)
        self.seconds = time.perf_counter() - began

    def _resume(self, state_fd: int) -> None:
        lines = self._monitor.makefile("rb")

        def execute(command: str, **arguments: Any) -> Any:
            request = {"execute": command, "arguments": arguments}
            self._monitor.sendall(json.dumps(request).encode())
            while True:
                answer = json.loads(lines.readline())
                if "error" in answer:
                    raise SystemExit(f"QEMU refused {command}: {answer}")
                if "return" in answer:
                    return answer["return"]

        lines.readline()
        execute("qmp_capabilities")
        capability = {"capability": "x-ignore-shared", "state": True}
        execute("migrate-set-capabilities", capabilities=[capability])
        execute("migrate-incoming", uri=f"fd:{state_fd}")
        while execute("query-status")["status"] == "inmigrate":
            time.sleep(0.001)
        execute("cont")
        lines.close()

    def _wake(self) -> socket.socket:
        """Clock and random numbers, and nothing else."""
        body = os.urandom(64) + b"\4bare" + b"\0\0"
        self._port.sendall(b"SMOLVM-WAKE\n" + struct.pack("<I", len(body)) + body)
        assert self._port.recv(1) == b"T"
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        self._port.sendall(b"S" + struct.pack("<qI", seconds, nanoseconds))
        assert self._port.recv(1) == b"T"
        self._port.sendall(b"G")
        return self._port

    def _wait_for_sign(self, console: Path) -> None:
        # QEMU accepts before the guest listens: an early attempt would only be in the way.
        end = time.monotonic() + _BOOT_TIMEOUT_S
        while time.monotonic() < end and self.process.poll() is None:
            if console.exists() and SSH_SIGN in console.read_bytes():
                return
            time.sleep(0.005)

    def _wait_for_banner(self, port: int) -> socket.socket:
        end = time.monotonic() + _BOOT_TIMEOUT_S
        while time.monotonic() < end and self.process.poll() is None:
            sock = socket.socket()
            sock.settimeout(1.0)
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
        self._port.close()
        self._stack.close()
