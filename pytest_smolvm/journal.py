"""The commands that were run in a VM: the last ones in memory, all of them in a file."""

from __future__ import annotations

import json
import logging
import os
import shlex
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

JOURNAL_NAME = "commands.jsonl"
_EARLIER_NAME = "commands.1.jsonl"
_REMEMBERED = 50
_OUTPUT_CHARS = 4000
_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One command, and what came of it."""

    command: str
    at: float
    """When it began: seconds since the epoch."""
    duration_s: float
    exit_code: int | None
    """None: it came to no end, see ``error``."""
    stdout: str = ""
    stderr: str = ""
    """The last of what it printed."""
    error: str = ""
    tries: int = 1
    """How often it was run, the last time being the one told of."""


class Journal:
    """Where a VM's commands are noted. ``directory`` None: in memory alone.

    The file takes one JSON object a line; past 1 MiB it becomes
    ``commands.1.jsonl``, and the one before that is dropped.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._entries: deque[Entry] = deque(maxlen=_REMEMBERED)
        self._guard = threading.Lock()

    @property
    def entries(self) -> list[Entry]:
        """The last commands, the oldest first."""
        return list(self._entries)

    def note(
        self,
        command: str | Sequence[str],
        duration_s: float,
        exit_code: int | None,
        *,
        stdout: str = "",
        stderr: str = "",
        error: str = "",
        tries: int = 1,
    ) -> None:
        """Note a command that has just come to its end."""
        entry = Entry(
            command=command if isinstance(command, str) else shlex.join(map(str, command)),
            at=round(time.time() - duration_s, 3),
            duration_s=round(duration_s, 4),
            exit_code=exit_code,
            stdout=stdout[-_OUTPUT_CHARS:],
            stderr=stderr[-_OUTPUT_CHARS:],
            error=error[:_OUTPUT_CHARS],
            tries=tries,
        )
        with self._guard:
            self._entries.append(entry)
            if self._directory is not None:
                self._write(self._directory, json.dumps(asdict(entry)))

    @staticmethod
    def _write(directory: Path, line: str) -> None:
        path = directory / JOURNAL_NAME
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "a") as file:
                file.write(line + "\n")
                full = file.tell() > _FILE_BYTES
            if full:
                path.replace(directory / _EARLIER_NAME)
        except OSError as error:
            # The command has been run; that must not turn into a failure because
            # the host's disk is full.
            logger.warning("%s cannot be written: %s", path, error.strerror)
