"""Test suites that pytester runs with fakes in the place of guests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_smolvm.inventory import Entry, inventory
from pytest_smolvm.store import Store

ROOT = Path(__file__).parents[2]
CONFTEST = """
import sys
sys.path.append({root!r})
from tests.plugin import fakes
fakes.install()
"""

Suite = Callable[..., pytest.RunResult]


OTHER_PLUGINS = ("asyncio", "rerunfailures", "timeout", "hypothesispytest")


@pytest.fixture(autouse=True)
def as_at_a_desk(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest's output does not depend on whether this runs in CI."""
    for name in ("CI", "BUILD_NUMBER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def without_other_plugins(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugins that our own checks bring are left out, unless a test is about them."""
    # After pytester, which clears the variable.
    monkeypatch.setenv("PYTEST_ADDOPTS", " ".join(f"-p no:{name}" for name in OTHER_PLUGINS))


@pytest.fixture
def with_other_plugins(without_other_plugins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-asyncio, pytest-rerunfailures, pytest-timeout and hypothesis are there."""
    monkeypatch.delenv("PYTEST_ADDOPTS")


@pytest.fixture
def files(pytester: pytest.Pytester) -> dict[str, Path]:
    """A kernel and a root disk that exist; nothing looks inside."""
    paths = {name: pytester.path / name for name in ("kernel", "rootfs", "initrd")}
    for path in paths.values():
        path.write_text("content")
    return paths


@pytest.fixture
def boots(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many machines were started so far."""
    log = pytester.path / "boots.log"
    monkeypatch.setenv("FAKE_BOOT_LOG", str(log))
    return lambda: len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def fake_suite(
    pytester: pytest.Pytester,
    files: dict[str, Path],
    own_state: Path,
    boots: Callable[[], int],
) -> Suite:
    """``fake_suite(source, *arguments)`` runs a test file whose VMs are fakes."""
    pytester.makeconftest(CONFTEST.format(root=str(ROOT)))

    def run(source: str = "", *arguments: str, ini: str = "") -> pytest.RunResult:
        if source:
            pytester.makepyfile(source)
        lines = [line.strip() for line in ini.splitlines()]
        if not any(line.startswith("smolvm_prefetch") for line in lines):
            # What one test has booted for the next would count as its own.
            lines.append("smolvm_prefetch = 0")
        pytester.makeini(
            "[pytest]\nsmolvm_kernel_path = kernel\nsmolvm_rootfs_path = rootfs\n"
            + "".join(f"{line}\n" for line in lines)
        )
        return pytester.runpytest_subprocess(*arguments, timeout=120)

    return run


@pytest.fixture
def kept(own_state: Path) -> Callable[[], dict[str, str]]:
    """What was kept: why, by the name of the test on whose account it was."""

    def look() -> dict[str, str]:
        found = {}
        for entry in entries(own_state):
            retained = entry.record.retained
            assert not entry.live
            reason = retained.reason if retained else "retain_disk_on_delete"
            found[entry.record.usage.test.rpartition("::")[2]] = reason
        return found

    return look


def entries(state_dir: Path) -> list[Entry]:
    return inventory(Store(state_dir)) if state_dir.exists() else []


def commands_in(entry: Entry) -> list[dict[str, Any]]:
    text = (entry.path / "commands.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
