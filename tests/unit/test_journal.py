"""The journal of commands."""

from __future__ import annotations

import json
import logging
import stat
from pathlib import Path

import pytest

from pytest_smolvm.journal import Journal


def test_it_notes_commands_in_memory_and_in_a_private_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.note(["echo", "a b"], 0.25, 0, stdout="a b\n")
    journal.note("sleep 9", 1.0, None, error="too long", tries=3)
    lines = [json.loads(line) for line in (tmp_path / "commands.jsonl").read_text().splitlines()]
    assert [line["command"] for line in lines] == ["echo 'a b'", "sleep 9"]
    assert [entry.command for entry in journal.entries] == ["echo 'a b'", "sleep 9"]
    assert lines[1]["exit_code"] is None
    assert lines[1]["error"] == "too long"
    assert lines[1]["tries"] == 3
    assert stat.S_IMODE((tmp_path / "commands.jsonl").stat().st_mode) == 0o600


def test_neither_memory_nor_file_grows_without_end(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in range(1000):
        journal.note(f"command {number}", 0.1, 0, stdout="x" * 100_000)
    assert len(journal.entries) == 50
    assert journal.entries[-1].command == "command 999"
    assert all(len(entry.stdout) == 4000 for entry in journal.entries)
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(files) <= {"commands.jsonl", "commands.1.jsonl"}
    assert sum(files.values()) < 3 << 20
    last = [path for path in tmp_path.iterdir() if '"command 999"' in path.read_text()]
    assert last


def test_a_file_that_cannot_be_written_does_not_fail_the_command(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        journal.note("true", 0.1, 0)
    assert "cannot be written" in caplog.text
    assert journal.entries[0].exit_code == 0
