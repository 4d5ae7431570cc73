"""The guest behind the stand-in: QEMU, emulating; its network and a serial port play vsock.

The host's side of vsock is as Firecracker has it. Behind it, the relay's port leads to the guest's
TCP ports by way of QEMU's user network, and the agent's to the serial port that guests of QEMU have
for it: that the guest's own side of vsock works is tried elsewhere, over its loopback.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

RELAY_PORT = 1024
AGENT_PORT = 1025
_MONITOR = "standin-monitor.sock"
_AGENT = "standin-agent.sock"


class QemuGuest:
    """One QEMU, which ends with this process. ``on_reset`` is called when the guest resets."""

    def __init__(self, on_reset: Callable[[], None], kernel: str = "", initrd: str = "") -> None:
        """``kernel``, ``initrd``: what is told of to QEMU, which wants them again, on a load."""
        self._on_reset = on_reset
        self._at_load = {"kernel_image_path": kernel, "initrd_path": initrd} if kernel else {}
        self._process: subprocess.Popen[bytes] | None = None
        self._guard = threading.Lock()
        self._answers: list[dict[str, Any]] = []
        self._answered = threading.Condition()
        self._ports: dict[int, int] = {}
        self._gone = False

    def start(self, config: dict[str, Any]) -> None:
        self._launch(config, [])
        self._command("cont")

    def load(self, config: dict[str, Any], memory: Path) -> None:
        source = {**config["boot-source"], **self._at_load}
        self._launch({**config, "boot-source": source}, ["-incoming", f"exec:cat {memory}"])
        while self._command("query-status")["status"] == "inmigrate":
            threading.Event().wait(0.01)

    def pause(self) -> None:
        self._command("stop")

    def resume(self) -> None:
        self._command("cont")

    def ctrl_alt_del(self) -> None:
        keys = [{"type": "qcode", "data": key} for key in ("ctrl", "alt", "delete")]
        self._command("send-key", {"keys": keys})

    def save(self, memory: Path) -> None:
        self._command("migrate-set-parameters", {"max-bandwidth": 1 << 40})
        self._command("migrate", {"uri": f"exec:cat > {memory}"})
        while (status := self._command("query-migrate")["status"]) != "completed":
            if status in ("failed", "cancelled"):
                raise OSError(f"saving ended as {status}")
            threading.Event().wait(0.01)

    def _launch(self, config: dict[str, Any], more: list[str]) -> None:
        machine, source = config["machine-config"], config["boot-source"]
        # The card is there in QEMU's guests, too; what is not there is PCI, on Firecracker.
        words = [word for word in source.get("boot_args", "").split() if word != "pci=off"]
        argv = [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", "q35,sata=off,smbus=off,usb=off", "-cpu", "max"),
            *("-accel", "tcg,thread=single,tb-size=128", "-smp", str(machine["vcpu_count"])),
            *("-m", str(machine["mem_size_mib"]), "-S", "-no-reboot", "-no-shutdown"),
            *("-kernel", source["kernel_image_path"], "-append", " ".join(words)),
            *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
            *("-qmp", f"unix:{_MONITOR},server=on,wait=off"),
            *("-chardev", f"socket,id=agent,path={_AGENT},server=on,wait=off"),
            *("-device", "virtio-serial-pci"),
            *("-device", "virtserialport,chardev=agent,name=org.smolvm.port"),
            *("-device", "virtio-rng-pci"),
        ]
        cards = config.get("network-interfaces", {})
        for card in cards.values():
            argv += [
                *("-netdev", f"tap,id=net0,ifname={card['host_dev_name']},script=no,downscript=no"),
                *("-device", f"virtio-net-pci,netdev=net0,romfile=,mac={card['guest_mac']}"),
            ]
        self._has_card = bool(cards)
        if not cards:
            # The way in, which is vsock on Firecracker.
            argv += ["-netdev", "user,id=net0,restrict=on"]
            argv += ["-device", "virtio-net-pci,netdev=net0,romfile="]
        if "initrd_path" in source:
            argv += ["-initrd", source["initrd_path"]]
        for name, drive in config.get("drives", {}).items():
            read_only = "on" if drive.get("is_read_only") else "off"
            argv += [
                *(
                    "-drive",
                    f"if=none,id={name},format=raw,file={drive['path_on_host']},"
                    f"read-only={read_only},file.locking=off",
                ),
                *("-device", f"virtio-blk-pci,drive={name}"),
            ]
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *argv, *more], stdin=subprocess.DEVNULL
        )
        self._meet_monitor()
        if "vsock" in config:
            self._listen(config["vsock"]["uds_path"])

    # -- QEMU's monitor -------------------------------------------------------

    def _meet_monitor(self) -> None:
        while True:
            monitor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                monitor.connect(_MONITOR)
                break
            except OSError:
                monitor.close()
                if self._process is None or self._process.poll() is not None:
                    raise OSError("QEMU ended as it started") from None
                threading.Event().wait(0.01)
        self._monitor = monitor.makefile("rwb", buffering=0)
        json.loads(self._monitor.readline())
        threading.Thread(target=self._read_monitor, daemon=True).start()
        self._command("qmp_capabilities")

    def _read_monitor(self) -> None:
        with contextlib.suppress(OSError):
            self._read_messages()
        with self._answered:
            self._gone = True
            self._answered.notify_all()

    def _read_messages(self) -> None:
        for line in self._monitor:
            message = json.loads(line)
            if message.get("event") == "SHUTDOWN":
                # One that only switches itself off stands still then, as on Firecracker on x86.
                if message["data"]["reason"] in ("guest-reset", "guest-panic"):
                    self._on_reset()
            elif "event" not in message:
                with self._answered:
                    self._answers.append(message)
                    self._answered.notify_all()

    def _command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        with self._guard, self._answered:
            request = {"execute": name, "arguments": arguments or {}}
            self._monitor.write(json.dumps(request).encode() + b"\n")
            self._answered.wait_for(lambda: self._answers or self._gone, timeout=60)
            if not self._answers:
                raise OSError(f"QEMU has ended, or does not answer to {name}")
            answer = self._answers.pop(0)
        if "error" in answer:
            raise OSError(f"{name}: {answer['error']['desc']}")
        return answer["return"]

    # -- vsock ----------------------------------------------------------------

    def _listen(self, path: str) -> None:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.bind(path)
        server.listen(64)

        def serve() -> None:
            while True:
                connection, _ = server.accept()
                threading.Thread(target=self._take, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()

    def _take(self, connection: socket.socket) -> None:
        with connection:
            line = b""
            while not line.endswith(b"\n") and len(line) < 64:
                byte = connection.recv(1)
                if not byte:
                    return
                line += byte
            words = line.split()
            if len(words) != 2 or words[0] != b"CONNECT" or not words[1].isdigit():
                return
            port = int(words[1])
            if port == AGENT_PORT:
                target = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                target.connect(_AGENT)
                connection.sendall(b"OK 1073741824\n")
            elif port == RELAY_PORT:
                connection.sendall(b"OK 1073741825\n")
                wanted = connection.recv(2, socket.MSG_WAITALL)
                if len(wanted) < 2:
                    return
                (number,) = struct.unpack("<H", wanted)
                target = socket.create_connection(self._address_of(number))
            else:
                return  # nobody listens there
            with target:
                _carry(connection, target)

    def _address_of(self, guest_port: int) -> tuple[str, int]:
        if self._has_card:
            return "10.0.2.15", guest_port
        if guest_port not in self._ports:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port: int = free.getsockname()[1]
            line = f"hostfwd_add net0 tcp:127.0.0.1:{port}-:{guest_port}"
            self._command("human-monitor-command", {"command-line": line})
            self._ports[guest_port] = port
        return "127.0.0.1", self._ports[guest_port]


def _carry(one: socket.socket, other: socket.socket) -> None:
    def copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            for end in (source, target):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    back = threading.Thread(target=copy, args=(other, one), daemon=True)
    back.start()
    copy(one, other)
    back.join()


def end_process(status: int) -> None:
    """End at once; QEMU goes with us."""
    os._exit(status)
