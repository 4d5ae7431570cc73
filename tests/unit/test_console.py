"""A console's file: whole while it is small, its middle left out when it is not."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from pytest_smolvm.backends import console
from pytest_smolvm.backends.console import CappedLog, Console


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("LIMIT", 8000), ("KEPT_HEAD", 1000), ("KEPT_TAIL", 2000)):
        monkeypatch.setattr(console, f"{name}_BYTES", size)


def test_all_of_it_is_kept_in_order_and_private(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_text("of the boot before\n")
    log = CappedLog(path)
    for number in range(100):
        log.write(b"%d\n" % number)
    assert path.read_text() == "of the boot before\n" + "".join(f"{n}\n" for n in range(100))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("block", [1, 7, 900, 50_000])
def test_of_a_flood_the_first_and_the_last_is_kept(tmp_path: Path, block: int) -> None:
    path = tmp_path / "console.log"
    flood = b"".join(b"line %06d\n" % number for number in range(8000))
    log = CappedLog(path)
    largest = 0
    for at in range(0, len(flood), block):
        log.write(flood[at : at + block])
        largest = max(largest, path.stat().st_size)
    text = path.read_bytes()
    assert largest <= 8000 + 100
    assert text[:1000] == flood[:1000]
    assert text.endswith(flood[-1000:])
    assert re.findall(rb"\[pytest-smolvm: some \d+ KiB are left out here\]", text)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["console.log"]


def test_what_a_full_disk_does_not_take_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "console.log"
    log = CappedLog(path)
    log.write(b"before\n")

    def full(*_: object, **__: object) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        log.write(b"lost\n")
        log.write(b"lost, too\n")
    log.write(b"after\n")
    assert path.read_text() == ("before\n\n[pytest-smolvm: 15 bytes could not be written]\nafter\n")
    assert caplog.text.count("No space left on device") == 1


def test_what_was_sent_before_the_end_is_there_after_it(tmp_path: Path) -> None:
    """However much it is, and though the other end was never closed."""
    path = tmp_path / "console.log"
    ours, theirs = socket.socketpair()
    taken = Console(ours, path)
    theirs.sendall(b"x" * 1_000_000)
    taken.finish()
    assert path.stat().st_size == 1_000_000
    taken.finish()
    theirs.close()


def test_an_end_that_nobody_waits_for_closes_the_socket(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    taken = Console(ours, tmp_path / "console.log")
    theirs.sendall(b"bye")
    theirs.close()
    taken.finish()
    assert (tmp_path / "console.log").read_bytes() == b"bye"
    assert ours.fileno() == -1


def test_a_sign_is_seen_wherever_blocks_part(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    taken = Console(ours, tmp_path / "console.log", b"listening")
    for byte in b"it says: listenin":
        theirs.sendall(bytes([byte]))
        taken.flush()
    assert not taken.has_sign
    theirs.sendall(b"g now")
    taken.flush()
    assert taken.has_sign
    assert (tmp_path / "console.log").read_bytes() == b"it says: listening now"
    taken.forget_sign()
    theirs.sendall(b" and on")
    taken.flush()
    assert not taken.has_sign
    theirs.close()
    taken.finish()
    taken.flush()
