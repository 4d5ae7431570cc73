"""The stand-in's program: ``python tests/contract/standin [--standin-...] --api-sock PATH ...``

It is started by its path, in a directory and an environment that know nothing of this project.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import guest
import rules


def _version() -> str:
    """Its release, and a name for what is behind it: saved states are good for nothing else."""
    told = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        told.update(path.read_bytes())
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is not None:
        facts = Path(qemu).stat()
        told.update(f"{facts.st_size} {facts.st_mtime_ns}".encode())
    return f"{rules.VERSION}-standin-{told.hexdigest()[:12]}"


_BAD_ARGUMENTS = 153  # FcExitCode::ArgParsing


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="firecracker", allow_abbrev=False)
    parser.add_argument("--api-sock", required=True)
    parser.add_argument("--id", default="anonymous-instance")
    parser.add_argument("--log-path", type=Path)
    parser.add_argument("--level", default="Info")
    parser.add_argument("--metrics-path", type=Path)
    parser.add_argument("--standin-record", type=Path)
    parser.add_argument("--standin-version", default=_version())
    parser.add_argument("--standin-fault", default="")
    parser.add_argument("--standin-kernel", default="")
    parser.add_argument("--standin-initrd", default="")
    if "--version" in sys.argv:
        version = next(
            (a.partition("=")[2] for a in sys.argv if a.startswith("--standin-version=")),
            _version(),
        )
        sys.stdout.write(
            f"Firecracker v{version}\n\nSupported snapshot data format versions: "
            f"{rules.SNAPSHOT_VERSION}\n"
        )
        raise SystemExit(0)
    try:
        return parser.parse_args()
    except SystemExit:
        raise SystemExit(_BAD_ARGUMENTS) from None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: Any) -> None:
        """Nothing: standard error is the machine's log."""

    def do_GET(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def do_PATCH(self) -> None:
        self._handle()

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        options = self.server.options
        if options.standin_record:
            with options.standin_record.open("a") as record:
                entry = {"method": self.command, "path": self.path, "body": body.decode()}
                record.write(json.dumps(entry) + "\n")
        fault, _, where = options.standin_fault.partition(":")
        if where == self.path:
            self._go_wrong(fault)
        try:
            answer = self.server.instance.answer(self.command, self.path, body)
        except rules.Refused as error:
            self._say(400, {"fault_message": str(error)})
            if isinstance(error, rules.Fatal):
                self.wfile.flush()
                guest.end_process(1)
        except OSError as error:
            self._say(500, {"fault_message": f"Internal error: {error}"})
        else:
            self._say(200 if answer is not None else 204, answer)

    def _go_wrong(self, fault: str) -> None:
        if fault == "dies":
            sys.stderr.write("a fault that was asked for\n")
            guest.end_process(139)
        elif fault == "silent":
            time.sleep(3600)
        elif fault == "slow":
            time.sleep(0.5)
        elif fault == "garbage":
            self.wfile.write(b"\x00\xffnothing like HTTP\r\n\r\n")
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "drips":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            for _ in range(100000):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)
        elif fault == "huge":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
            for _ in range(100):
                self.wfile.write(b" " * 1000000)
        elif fault == "odd":
            self._say(200, {"what": "is this"})
        elif fault == "later":
            threading.Timer(0.5, guest.end_process, [139]).start()

    def _say(self, status: int, answer: dict[str, Any] | None) -> None:
        data = b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        if data:
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(socketserver.UnixStreamServer):
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.instance = rules.Instance(
            options.id,
            guest.QemuGuest(
                lambda: guest.end_process(0), options.standin_kernel, options.standin_initrd
            ),
            version=options.standin_version,
        )
        super().__init__(options.api_sock, Handler)


def main() -> None:
    options = _arguments()
    if options.standin_fault == "at-start":
        sys.stderr.write("a fault that was asked for\n")
        raise SystemExit(1)
    if options.standin_fault == "never-listens":
        time.sleep(3600)
    for path in (options.log_path, options.metrics_path):
        if path is not None:
            path.open("a").close()
    os.umask(0o077)
    # One request at a time, in this thread: QEMU ends with the thread that started it.
    Server(options).serve_forever()


main()
