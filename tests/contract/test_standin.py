"""The stand-in refuses what Firecracker's public documentation says is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.contract.standin import rules


class _NoGuest:
    """Does nothing: what is tried here is what comes before a guest."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.done.append(name)


@pytest.fixture
def instance(tmp_path: Path) -> rules.Instance:
    (tmp_path / "kernel").write_bytes(b"\x7fELF")
    (tmp_path / "disk").write_bytes(b"disk")
    return rules.Instance("vm", _NoGuest())


def ask(instance: rules.Instance, method: str, path: str, body: Any = None) -> Any:
    return instance.answer(method, path, json.dumps(body).encode())


MACHINE = {"vcpu_count": 1, "mem_size_mib": 128}


def boot(instance: rules.Instance, tmp_path: Path) -> None:
    ask(instance, "PUT", "/machine-config", MACHINE)
    ask(instance, "PUT", "/boot-source", {"kernel_image_path": str(tmp_path / "kernel")})
    ask(instance, "PUT", "/actions", {"action_type": "InstanceStart"})


@pytest.mark.parametrize(
    ("method", "path", "body", "why"),
    [
        ("PUT", "/machine-config", {**MACHINE, "cores": 1}, "unknown field `cores`"),
        ("PUT", "/machine-config", {"vcpu_count": 1}, "missing field `mem_size_mib`"),
        ("PUT", "/machine-config", {**MACHINE, "vcpu_count": "1"}, "invalid type"),
        ("PUT", "/machine-config", {**MACHINE, "vcpu_count": True}, "invalid type"),
        ("PUT", "/machine-config", {**MACHINE, "vcpu_count": 33}, "invalid value"),
        ("PUT", "/machine-config", [], "expected struct"),
        ("PUT", "/boot-source", {"kernel_image_path": "/none"}, "kernel file cannot be opened"),
        ("PUT", "/drives/a", {"drive_id": "b", "is_root_device": False}, "No such file"),
        ("PUT", "/vsock", {"guest_cid": 2, "uds_path": "v"}, "invalid value"),
        ("PUT", "/actions", {"action_type": "Reset"}, "unknown variant"),
        ("PUT", "/actions", {"action_type": "InstanceStart"}, "without kernel configuration"),
        ("PUT", "/actions", {"action_type": "SendCtrlAltDel"}, "before starting"),
        ("PATCH", "/vm", {"state": "Paused"}, "before starting"),
        ("PUT", "/vm", {"state": "Paused"}, "Invalid request method"),
        ("PUT", "/snapshot/create", {"snapshot_path": "a", "mem_file_path": "b"}, "before start"),
        ("PUT", "/snapshot/load", {"snapshot_path": "a"}, "Exactly one of"),
        ("PUT", "/nothing", {}, "Invalid request method and/or path"),
        ("GET", "/nothing", None, "Invalid request method and/or path"),
    ],
)
def test_a_wrong_request_is_refused(
    instance: rules.Instance, method: str, path: str, body: Any, why: str
) -> None:
    with pytest.raises(rules.Refused, match=why):
        ask(instance, method, path, body)
    assert not instance.guest.done  # type: ignore[attr-defined]


def test_what_comes_before_the_start_is_refused_after_it(
    instance: rules.Instance, tmp_path: Path
) -> None:
    boot(instance, tmp_path)
    load = {"snapshot_path": "a", "mem_backend": {"backend_type": "File", "backend_path": "b"}}
    for path, body in (
        ("/machine-config", MACHINE),
        ("/boot-source", {"kernel_image_path": str(tmp_path / "kernel")}),
        ("/entropy", {}),
        ("/snapshot/load", load),
        ("/actions", {"action_type": "InstanceStart"}),
    ):
        with pytest.raises(rules.Refused, match="after starting the microVM"):
            ask(instance, "PUT", path, body)


def test_a_snapshot_is_of_a_paused_machine_and_loaded_by_one_that_has_nothing(
    instance: rules.Instance, tmp_path: Path
) -> None:
    boot(instance, tmp_path)
    paths = {"snapshot_path": str(tmp_path / "state"), "mem_file_path": str(tmp_path / "memory")}
    with pytest.raises(rules.Refused, match="not paused"):
        ask(instance, "PUT", "/snapshot/create", paths)
    ask(instance, "PATCH", "/vm", {"state": "Paused"})
    ask(instance, "PUT", "/snapshot/create", paths)
    (tmp_path / "memory").write_bytes(b"memory")
    memory = {"backend_type": "File", "backend_path": str(tmp_path / "memory")}
    load = {"snapshot_path": paths["snapshot_path"], "mem_backend": memory}
    used = rules.Instance("other", _NoGuest())
    ask(used, "PUT", "/machine-config", MACHINE)
    with pytest.raises(rules.Refused, match="not allowed after configuring"):
        ask(used, "PUT", "/snapshot/load", load)
    fresh = rules.Instance("third", _NoGuest())
    ask(fresh, "PUT", "/snapshot/load", load)
    assert fresh.state == "Paused"
    broken = rules.Instance("fourth", _NoGuest())
    (tmp_path / "state").write_text("not a state")
    with pytest.raises(rules.Fatal, match="Failed to get snapshot state"):
        ask(broken, "PUT", "/snapshot/load", load)
