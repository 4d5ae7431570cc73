"""What Firecracker's API takes and refuses, and when: from its public specification.

Written from src/firecracker/swagger/firecracker.yaml and docs/ of release 1.16, apart from the code
under test, and knows of no guest: what is to be done is left to a ``Guest``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

VERSION = "1.16.1"
SNAPSHOT_VERSION = "8.0.0"

_KINDS: dict[str, type | tuple[type, ...]] = {"string": str, "boolean": bool, "integer": int}


@dataclass(frozen=True)
class Field:
    kind: str
    required: bool = False
    choices: tuple[str, ...] = ()
    least: int | None = None
    most: int | None = None
    fields: dict[str, Field] | None = None


def _string(*, required: bool = False, choices: tuple[str, ...] = ()) -> Field:
    return Field("string", required=required, choices=choices)


_BOOLEAN = Field("boolean")
_LIMITER = Field("object", fields={})

SCHEMAS: dict[str, dict[str, Field]] = {
    "/machine-config": {
        "vcpu_count": Field("integer", required=True, least=1, most=32),
        "mem_size_mib": Field("integer", required=True, least=1),
        "smt": _BOOLEAN,
        "track_dirty_pages": _BOOLEAN,
        "cpu_template": _string(choices=("C3", "T2", "T2S", "T2CL", "T2A", "V1N1", "None")),
        "huge_pages": _string(choices=("None", "Transparent", "2M")),
    },
    "/boot-source": {
        "kernel_image_path": _string(required=True),
        "initrd_path": _string(),
        "boot_args": _string(),
    },
    "/drives/": {
        "drive_id": _string(required=True),
        "is_root_device": Field("boolean", required=True),
        "partuuid": _string(),
        "cache_type": _string(choices=("Unsafe", "Writeback")),
        "is_read_only": _BOOLEAN,
        "path_on_host": _string(),
        "rate_limiter": _LIMITER,
        "io_engine": _string(choices=("Sync", "Async")),
        "socket": _string(),
    },
    "/network-interfaces/": {
        "iface_id": _string(required=True),
        "host_dev_name": _string(required=True),
        "guest_mac": _string(),
        "mtu": Field("integer", least=68, most=65535),
        "rx_rate_limiter": _LIMITER,
        "tx_rate_limiter": _LIMITER,
    },
    "/entropy": {"rate_limiter": _LIMITER},
    "/vsock": {
        "guest_cid": Field("integer", required=True, least=3),
        "uds_path": _string(required=True),
        "vsock_id": _string(),
    },
    "/logger": {
        "level": _string(),
        "log_path": _string(),
        "show_level": _BOOLEAN,
        "show_log_origin": _BOOLEAN,
        "module": _string(),
    },
    "/metrics": {"metrics_path": _string(required=True)},
    "/actions": {
        "action_type": _string(
            required=True, choices=("FlushMetrics", "InstanceStart", "SendCtrlAltDel")
        )
    },
    "/vm": {"state": _string(required=True, choices=("Paused", "Resumed"))},
    "/snapshot/create": {
        "mem_file_path": _string(required=True),
        "snapshot_path": _string(required=True),
        "snapshot_type": _string(choices=("Full", "Diff")),
    },
    "/snapshot/load": {
        "snapshot_path": _string(required=True),
        "mem_file_path": _string(),
        "mem_backend": Field(
            "object",
            fields={
                "backend_type": _string(required=True, choices=("File", "Uffd")),
                "backend_path": _string(required=True),
            },
        ),
        "enable_diff_snapshots": _BOOLEAN,
        "track_dirty_pages": _BOOLEAN,
        "resume_vm": _BOOLEAN,
        "clock_realtime": _BOOLEAN,
        "vsock_override": Field("object", fields={"uds_path": _string(required=True)}),
    },
}

_METHODS = {
    **dict.fromkeys(SCHEMAS, "PUT"),
    "/vm": "PATCH",
}
_BEFORE_START = (
    *("/machine-config", "/boot-source", "/drives/", "/network-interfaces/"),
    *("/entropy", "/vsock", "/snapshot/load"),
)
_AFTER_START = ("/vm", "/snapshot/create")


class Refused(Exception):
    """Status 400, with a fault message."""


class Fatal(Refused):
    """The same, and the process ends: a snapshot that could not be loaded."""


class Guest(Protocol):
    """What runs behind the API."""

    def start(self, config: dict[str, Any]) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def ctrl_alt_del(self) -> None: ...
    def save(self, memory: Path) -> None: ...
    def load(self, config: dict[str, Any], memory: Path) -> None: ...


def check(schema: dict[str, Field], body: Any, where: str = "") -> None:
    """Refuse what the specification does not know: serde's deny_unknown_fields, and types."""
    if not isinstance(body, dict):
        raise Refused(f"{_DESERIALIZING}: invalid type, expected struct{where}")
    for name, value in body.items():
        if name not in schema:
            raise Refused(f"{_DESERIALIZING}: unknown field `{name}`{where}")
        wanted = schema[name]
        if wanted.kind == "object":
            check(wanted.fields or {}, value, f" in {name}")
            continue
        kind = _KINDS[wanted.kind]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise Refused(f"{_DESERIALIZING}: invalid type: {value!r}, expected {wanted.kind}")
        if wanted.choices and value not in wanted.choices:
            raise Refused(f"{_DESERIALIZING}: unknown variant `{value}`")
        if wanted.least is not None and value < wanted.least:
            raise Refused(f"{_DESERIALIZING}: invalid value: {name}={value}")
        if wanted.most is not None and value > wanted.most:
            raise Refused(f"{_DESERIALIZING}: invalid value: {name}={value}")
    for name, wanted in schema.items():
        if wanted.required and name not in body:
            raise Refused(f"{_DESERIALIZING}: missing field `{name}`{where}")


_DESERIALIZING = "An error occurred when deserializing the json body of a request"


@dataclass
class Instance:
    """One microVM: its state, its configuration, and the guest behind it."""

    vm_id: str
    guest: Guest
    state: str = "Not started"
    config: dict[str, Any] = field(default_factory=dict)
    version: str = VERSION

    def answer(self, method: str, path: str, text: bytes) -> dict[str, Any] | None:
        """What a request is answered with; None: status 204. Raises ``Refused``."""
        if method == "GET":
            return self._tell(path)
        key = re.sub(r"^(/drives/|/network-interfaces/).+", r"\1", path)
        if _METHODS.get(key) != method:
            raise Refused(f"Invalid request method and/or path: {method} {path}.")
        try:
            body = json.loads(text)
        except ValueError as error:
            raise Refused(f"{_DESERIALIZING}: {error}") from None
        check(SCHEMAS[key], body)
        if key in _BEFORE_START and self.state != "Not started":
            raise Refused("The requested operation is not supported after starting the microVM.")
        if key in _AFTER_START and self.state == "Not started":
            raise Refused("The requested operation is not supported before starting the microVM.")
        _HANDLERS[key](self, path.rpartition("/")[2], body)
        return None

    def _tell(self, path: str) -> dict[str, Any]:
        answers: dict[str, dict[str, Any]] = {
            "/version": {"firecracker_version": self.version},
            "/": {
                "id": self.vm_id,
                "state": self.state,
                "vmm_version": self.version,
                "app_name": "Firecracker",
            },
        }
        if path not in answers:
            raise Refused(f"Invalid request method and/or path: GET {path}.")
        return answers[path]

    def _configure_one(self, identifier: str, body: dict[str, Any], key: str, name: str) -> None:
        if body[name] != identifier:
            raise Refused(
                f"The id from the path [{identifier}] does not match the id from the body "
                f"[{body[name]}]!"
            )
        self.config.setdefault(key, {})[identifier] = body

    def _boot_source(self, _: str, body: dict[str, Any]) -> None:
        files = {"kernel_image_path": "kernel", "initrd_path": "initrd"}
        for name, what in files.items():
            if name in body and not Path(body[name]).is_file():
                raise Refused(
                    f"Boot source error: The {what} file cannot be opened: "
                    "No such file or directory (os error 2)"
                )
        # By a name that is good for as long as the file is: QEMU wants it again on a load.
        resolved = {name: str(Path(body[name]).resolve()) for name in files if name in body}
        self.config["boot-source"] = {**body, **resolved}

    def _drive(self, identifier: str, body: dict[str, Any]) -> None:
        path = body.get("path_on_host")
        if path is None or not Path(path).is_file():
            raise Refused(
                "Unable to create the block device: Error manipulating the backing file: "
                f"No such file or directory (os error 2) {path}"
            )
        self._configure_one(identifier, body, "drives", "drive_id")

    def _action(self, _: str, body: dict[str, Any]) -> None:
        action = body["action_type"]
        if action == "InstanceStart":
            if self.state != "Not started":
                raise Refused(
                    "The requested operation is not supported after starting the microVM."
                )
            if "boot-source" not in self.config:
                raise Refused("Cannot start microvm without kernel configuration.")
            with Path(self.config["boot-source"]["kernel_image_path"]).open("rb") as kernel:
                if kernel.read(4) != b"\x7fELF":
                    raise Refused(
                        "Cannot load kernel due to invalid memory configuration or "
                        "invalid kernel image: Kernel Loader: Invalid Elf magic number"
                    )
            self.guest.start(self.config)
            self.state = "Running"
        elif self.state == "Not started":
            raise Refused("The requested operation is not supported before starting the microVM.")
        elif action == "SendCtrlAltDel":
            self.guest.ctrl_alt_del()

    def _vm(self, _: str, body: dict[str, Any]) -> None:
        if body["state"] == "Paused":
            self.guest.pause()
            self.state = "Paused"
        else:
            self.guest.resume()
            self.state = "Running"

    def _create_snapshot(self, _: str, body: dict[str, Any]) -> None:
        if self.state != "Paused":
            raise Refused(
                "Cannot create a snapshot: the microVM is not paused: save/restore is not "
                "allowed in this state."
            )
        if body.get("snapshot_type") == "Diff":
            raise Refused("Cannot create a diff snapshot: dirty page tracking is not enabled.")
        self.guest.save(Path(body["mem_file_path"]))
        facts = {"version": SNAPSHOT_VERSION, "config": self.config}
        Path(body["snapshot_path"]).write_text(json.dumps(facts))

    def _load_snapshot(self, _: str, body: dict[str, Any]) -> None:
        if self.config:
            raise Refused(
                "Loading a microVM snapshot not allowed after configuring boot-specific resources."
            )
        if ("mem_file_path" in body) == ("mem_backend" in body):
            raise Refused("Exactly one of `mem_backend` and `mem_file_path` must be specified.")
        memory = Path(body.get("mem_file_path") or body["mem_backend"]["backend_path"])
        try:
            facts = json.loads(Path(body["snapshot_path"]).read_text())
            config = facts["config"]
            if facts["version"] != SNAPSHOT_VERSION:
                raise Fatal(f"Load snapshot error: unsupported version {facts['version']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Fatal(f"Load snapshot error: Failed to get snapshot state: {error}") from None
        if not memory.is_file():
            raise Fatal("Load snapshot error: Failed to load guest memory: No such file (2)")
        for drive in config.get("drives", {}).values():
            if not Path(drive["path_on_host"]).is_file():
                raise Fatal("Load snapshot error: Failed to restore devices: Block: (os error 2)")
        if "vsock_override" in body:
            config["vsock"]["uds_path"] = body["vsock_override"]["uds_path"]
        self.config = config
        try:
            self.guest.load(config, memory)
        except OSError as error:
            raise Fatal(f"Load snapshot error: {error}") from None
        self.state = "Paused"
        if body.get("resume_vm"):
            self.guest.resume()
            self.state = "Running"


def _plainly(key: str) -> Callable[[Instance, str, dict[str, Any]], None]:
    def handle(instance: Instance, _: str, body: dict[str, Any]) -> None:
        if key in ("logger", "metrics"):
            return
        instance.config[key] = body

    return handle


_HANDLERS: dict[str, Callable[[Instance, str, dict[str, Any]], None]] = {
    "/machine-config": _plainly("machine-config"),
    "/boot-source": Instance._boot_source,
    "/drives/": Instance._drive,
    "/network-interfaces/": lambda instance, identifier, body: instance._configure_one(
        identifier, body, "network-interfaces", "iface_id"
    ),
    "/entropy": _plainly("entropy"),
    "/vsock": _plainly("vsock"),
    "/logger": _plainly("logger"),
    "/metrics": _plainly("metrics"),
    "/actions": Instance._action,
    "/vm": Instance._vm,
    "/snapshot/create": Instance._create_snapshot,
    "/snapshot/load": Instance._load_snapshot,
}
