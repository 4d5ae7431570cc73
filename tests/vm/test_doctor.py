"""The command ``pytest-smolvm doctor``: on this host, and on hosts that lack something."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pytest_smolvm import SmolVM, VMConfig
from tests.conftest import COMMAND


def doctor(before: str = "", **variables: str) -> tuple[int, list[dict[str, Any]]]:
    """Run it by a shell, after ``before``; the exit status, and what was found."""
    done = subprocess.run(
        ["/bin/sh", "-c", f'{before}\nexec "$@"', "sh", COMMAND, "doctor", "--json"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    told = json.loads(done.stdout)
    assert told["can_run"] == (done.returncode == 0)
    return done.returncode, told["findings"]


def grades(findings: list[dict[str, Any]], subject: str) -> list[tuple[str, str]]:
    return [(entry["grade"], entry["text"]) for entry in findings if entry["subject"] == subject]


def test_on_this_host_vms_can_run(own_state: Path) -> None:
    status, findings = doctor()
    assert status == 0
    assert ("ok", "tcg (emulation) runs a guest") in grades(findings, "accelerators")
    assert any("qemu-system-x86_64, version " in text for _, text in grades(findings, "qemu"))
    assert len(grades(findings, "packages")) == 6
    assert {grade for grade, _ in grades(findings, "packages")} == {"ok"}
    for entry in findings:
        assert set(entry) == {"subject", "grade", "text", "cost", "remedy"}
        assert entry["grade"] == "ok" or (entry["cost"] and entry["remedy"]), entry
        assert "\n" not in "".join(entry.values())


def test_it_is_for_people_too(own_state: Path) -> None:
    done = subprocess.run([COMMAND, "doctor"], capture_output=True, text=True, check=True)
    assert "ok      accelerators: tcg (emulation) runs a guest\n" in done.stdout
    assert done.stdout.endswith("VMs can run here.\n")


def test_a_host_without_qemu(own_state: Path, tmp_path: Path) -> None:
    status, findings = doctor(PATH=str(tmp_path))
    assert status == 1
    (problem,) = (entry for entry in findings if entry["grade"] == "problem")
    assert problem["text"].startswith("qemu-system-")
    assert problem["cost"] == "no VM can run"
    assert problem["remedy"].startswith("apt-get install qemu-system-")
    assert grades(findings, "accelerators") == []
    assert ("note", "slirp4netns is not installed") in grades(findings, "tools")


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("1.16.1", "cannot run: it needs KVM, which cannot be used"),
        ("1.4.0", "is of no use: Firecracker 1.4.0 is too old"),
        ("nonsense", "is of no use: Firecracker says that its version is ''"),
    ],
)
def test_a_firecracker_that_is_there(
    own_state: Path, tmp_path: Path, version: str, text: str
) -> None:
    fake = tmp_path / "firecracker"
    fake.write_text(f"#!/bin/sh\necho Firecracker v{version}\n")
    fake.chmod(0o755)
    # Whatever KVM is good for here, it cannot be opened.
    qemu = tmp_path / "qemu-system-x86_64"
    qemu.write_text('#!/bin/sh\ncase "$*" in *kvm*) exit 1 ;; esac\nexit 85\n')
    qemu.chmod(0o755)
    _, findings = doctor(PATH=f"{tmp_path}:{os.environ['PATH']}")
    ((grade, told),) = grades(findings, "firecracker")
    assert grade == "note"
    assert told.startswith(f"{fake} {text}")


def test_an_emulator_that_emulates_nothing(own_state: Path, tmp_path: Path) -> None:
    fake = tmp_path / "qemu-system-x86_64"
    fake.write_text("#!/bin/sh\necho no good >&2; exit 3\n")
    fake.chmod(0o755)
    status, findings = doctor(PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert status == 1
    assert ("problem", "QEMU cannot even emulate a guest: QEMU could not run a guest under tcg "
            "(no good)") in grades(findings, "accelerators")  # fmt: skip
    assert ("note", f"{fake} is of version unknown") in grades(findings, "qemu")


def test_a_state_directory_that_will_not_do(own_state: Path) -> None:
    own_state.mkdir()
    own_state.chmod(0o777)
    status, findings = doctor()
    assert status == 1
    ((grade, text),) = grades(findings, "state")
    assert grade == "problem"
    assert "everybody may write to it" in text


@pytest.mark.parametrize(
    ("line", "grade", "text", "remedy"),
    [
        ("ulimit -n 200", "note", "a process may have 200 open files", "ulimit -n 1024"),
        ("ulimit -v 2000000", "problem", "1953 MiB of addresses", "ulimit -v unlimited"),
        ("ulimit -f 200000", "problem", "97 MiB of file size", "ulimit -f unlimited"),
    ],
)
def test_limits_that_are_too_low(
    own_state: Path, line: str, grade: str, text: str, remedy: str
) -> None:
    status, findings = doctor(line)
    assert status == (1 if grade == "problem" else 0)
    (found,) = (entry for entry in findings if entry["subject"] == "limits")
    assert found["grade"] == grade
    assert text in found["text"]
    assert found["remedy"] == remedy


def test_what_a_dead_owner_left_is_told_of_and_what_lives_is_not(
    micro_config: VMConfig, no_vms: Path
) -> None:
    (no_vms / "vms/of-a-dead-owner").mkdir(parents=True)
    # Not by SmolVM, which would sweep it first.
    assert [text for _, text in grades(doctor()[1], "leftovers")] == [
        "owners that died left of-a-dead-owner"
    ]
    with SmolVM(micro_config):
        assert grades(doctor()[1], "leftovers") == []
