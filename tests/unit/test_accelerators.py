"""Accelerators are tried, once per boot of the host.

What this host's KVM does cannot be chosen, so QEMU is stood in for by a script
wherever a test needs an outcome that this host does not have.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pytest_smolvm import BackendError
from pytest_smolvm.backends import accelerators, choose
from pytest_smolvm.backends.accelerators import report_accelerator
from pytest_smolvm.backends.qemu_args import ARCHITECTURES
from pytest_smolvm.plugin.header import describe_backend
from pytest_smolvm.store import Store

X86 = ARCHITECTURES["x86_64"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


@pytest.fixture
def kvm_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /dev/kvm that opens, whatever this host has."""
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(accelerators, "_KVM", device)
    monkeypatch.setattr(accelerators.os, "uname", lambda: type("U", (), {"machine": "x86_64"}))
    return device


def stand_in(tmp_path: Path, body: str) -> tuple[str, Path]:
    calls = tmp_path / "calls"
    calls.touch()
    script = tmp_path / "qemu"
    script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{body}\n')
    script.chmod(0o755)
    return str(script), calls


@pytest.mark.parametrize("name", ["x86_64", "aarch64"])
def test_the_probe_guest_runs_where_emulation_runs_it(name: str) -> None:
    architecture = ARCHITECTURES[name]
    qemu = shutil.which(architecture.binary)
    if qemu is None:
        pytest.skip(f"{architecture.binary} is not installed")
    report = accelerators.try_accelerator("tcg", qemu, architecture)
    assert report.usable, report.reason


def test_kvm_that_runs_the_probe_is_usable(tmp_path: Path, store: Store, kvm_device: Path) -> None:
    qemu, calls = stand_in(tmp_path, "exit 85")
    assert report_accelerator("kvm", store, qemu, X86).usable
    assert "-accel kvm" in calls.read_text()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'failed to set MSR' >&2; exit 134", "failed to set MSR"),
        ("exit 0", "exit status 0"),
        ("exec sleep 60", "did not end within"),
    ],
)
def test_kvm_that_opens_but_runs_no_guest_is_not_usable(
    tmp_path: Path, store: Store, kvm_device: Path, body: str, reason: str
) -> None:
    qemu, _ = stand_in(tmp_path, body)
    report = report_accelerator("kvm", store, qemu, X86)
    assert not report.usable
    assert reason in report.reason


def test_an_accelerator_is_tried_once_and_the_outcome_remembered(
    tmp_path: Path, store: Store, kvm_device: Path
) -> None:
    qemu, calls = stand_in(tmp_path, "exit 1")
    first = report_accelerator("kvm", store, qemu, X86)
    assert report_accelerator("kvm", Store(store.root), qemu, X86) == first
    assert len(calls.read_text().splitlines()) == 1


@pytest.mark.parametrize("change", ["boot", "qemu", "device"])
def test_what_was_found_is_forgotten_when_circumstances_change(
    tmp_path: Path,
    store: Store,
    kvm_device: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    qemu, calls = stand_in(tmp_path, "exit 1")
    report_accelerator("kvm", store, qemu, X86)
    if change == "boot":
        boot_id = tmp_path / "boot_id"
        boot_id.write_text("another boot")
        monkeypatch.setattr(accelerators, "_BOOT_ID", boot_id)
    elif change == "qemu":
        Path(qemu).write_text(Path(qemu).read_text() + "# another release\n")
    else:
        kvm_device.chmod(0o666)
    report_accelerator("kvm", store, qemu, X86)
    assert len(calls.read_text().splitlines()) == 2


def test_without_a_device_nothing_is_tried(tmp_path: Path, store: Store, kvm_device: Path) -> None:
    kvm_device.unlink()
    qemu, calls = stand_in(tmp_path, "exit 85")
    report = report_accelerator("kvm", store, qemu, X86)
    assert not report.usable
    assert "there is no /dev/kvm" in report.reason
    assert calls.read_text() == ""


def test_a_foreign_guest_cannot_use_kvm(tmp_path: Path, store: Store, kvm_device: Path) -> None:
    qemu, calls = stand_in(tmp_path, "exit 85")
    report = report_accelerator("kvm", store, qemu, ARCHITECTURES["aarch64"])
    assert not report.usable
    assert "aarch64" in report.reason
    assert calls.read_text() == ""


def test_choose_ends_in_an_accelerator_that_ran_a_guest_here(store: Store) -> None:
    backend = choose(store)
    assert backend.name == "qemu"
    kvm = report_accelerator("kvm", store, backend.binary, backend.architecture)  # type: ignore[attr-defined]
    assert backend.accelerator == ("kvm" if kvm.usable else "tcg")


def test_an_accelerator_that_is_asked_for_and_does_not_work_is_an_error(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(accelerators, "_KVM", tmp_path / "none")
    with pytest.raises(BackendError, match=r"'kvm' cannot be used here.*no /dev/kvm"):
        choose(store, accelerator="kvm")
    assert choose(store, accelerator="tcg").accelerator == "tcg"


def test_a_wrong_backend_or_accelerator_is_answered_with_the_right_ones(store: Store) -> None:
    with pytest.raises(BackendError, match=r"'xen'.*'qemu', 'firecracker'"):
        choose(store, "xen")
    with pytest.raises(BackendError, match=r"'mmx'.*kvm, hvf, tcg"):
        choose(store, accelerator="mmx")


def test_firecracker_is_refused_with_all_that_is_missing(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(accelerators, "_KVM", tmp_path / "none")
    with pytest.raises(BackendError) as caught:
        choose(store, "firecracker")
    text = str(caught.value)
    if shutil.which("firecracker") is None:
        assert "no program called 'firecracker' is on PATH" in text
    assert "needs KVM, and there is no /dev/kvm" in text
    assert "backend='qemu'" in text


@pytest.fixture
def firecracker_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kvm_device: Path) -> str:
    """A Firecracker on PATH, and a QEMU whose KVM runs the probe; the first's path."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, body in {
        "firecracker": "echo 'Firecracker v1.16.1'",
        "qemu-system-x86_64": "exit 85",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return str(folder / "firecracker")


@pytest.mark.parametrize("backend", [None, "auto", "firecracker"])
def test_firecracker_is_taken_where_it_is_there_and_kvm_ran_a_guest(
    store: Store, firecracker_here: str, backend: str | None
) -> None:
    found = choose(store, backend)
    assert (found.name, found.accelerator, found.version()) == ("firecracker", "kvm", "1.16.1")
    assert describe_backend(found) == (
        f"firecracker 1.16.1, kvm ({firecracker_here}, on a KVM that ran a guest)"
    )


def test_what_firecracker_cannot_do_is_left_to_qemu_and_told(
    store: Store, firecracker_here: str
) -> None:
    found = choose(store, not_on_firecracker=["it knits no pullovers"])
    assert (found.name, found.accelerator) == ("qemu", "kvm")
    assert "(not firecracker: it knits no pullovers)" in describe_backend(found)
    with pytest.raises(BackendError, match="cannot be used here: it knits no pullovers"):
        choose(store, "firecracker", not_on_firecracker=["it knits no pullovers"])
    assert choose(store, "qemu").name == "qemu"
    assert choose(store, accelerator="tcg").name == "qemu"
    with pytest.raises(BackendError, match=r"runs on KVM only, and .* 'tcg'"):
        choose(store, "firecracker", accelerator="tcg")


def test_firecracker_is_not_taken_where_kvm_ran_no_guest(
    store: Store, firecracker_here: str
) -> None:
    qemu = Path(firecracker_here).with_name("qemu-system-x86_64")
    qemu.write_text("#!/bin/sh\necho 'failed to set MSR' >&2; exit 134\n")
    found = choose(store)
    assert (found.name, found.accelerator) == ("qemu", "tcg")
    with pytest.raises(BackendError, match=r"needs KVM, and .*failed to set MSR"):
        choose(store, "firecracker")


def test_without_qemu_the_error_names_the_package(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(name: str, package: str) -> str:
        from pytest_smolvm.process import ToolError

        raise ToolError(f"{name!r} is not installed; apt-get install {package}")

    monkeypatch.setattr("pytest_smolvm.backends.find_tool", missing)
    with pytest.raises(BackendError, match="apt-get install qemu-system"):
        choose(store)
