"""Every guide in docs/guides is true: its files are written, its commands run, its output found.

In a guide, a block whose first line is ``# NAME`` is a file. In a console block,
lines that begin with ``$ `` are commands, and those under them are found in
their output, in that order, with others between; those of a text block, in the output of the
command before it. ``...`` stands for anything, and so do
numbers and the ids of VMs; an id that has been seen stands for the same VM from then on. How many
VMs have booted and how many were restored depends on what was there before; their sum does not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDES = Path(__file__).parents[2] / "docs/guides"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\S+)\n")
# What differs from run to run, and the pattern that it is found by.
_VARYING = re.compile(r"(?P<any>\.\.\.)|(?P<id>vm-[0-9a-f]{8})|(?P<number>\b\d+\.\d+[.\d]*)")
_STARTED = re.compile(r"(\d+) booted, (\d+) restored")


class Reader:
    """Does what a guide says, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids: dict[str, str] = {}
        self._output = ""
        self.commands_run = 0

    def read(self, text: str) -> None:
        for language, block in _BLOCK.findall(text):
            name = _FILE.match(block)
            if language == "console":
                for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                    command, _, expected = part.partition("\n")
                    self._run(command)
                    self._find(expected.splitlines(), f"after $ {command}")
            elif language == "text":
                self._find(block.splitlines(), "in the last output")
            elif name is not None:
                (self._folder / name[1]).write_text(block)

    def _run(self, command: str) -> None:
        for told, real in self._ids.items():
            command = command.replace(told, real)
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=self._folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        self.commands_run += 1
        self._output = done.stdout

    def _find(self, expected: list[str], where: str) -> None:
        lines = iter(self._output.splitlines())
        for line in expected:
            pattern = re.compile(self._pattern(line))
            found = next((m for each in lines if (m := _match(pattern, each, line))), None)
            assert found, f"{where} there is no {line!r} (in this place):\n{self._output}"
            new = {name.replace("_", "-"): vm_id for name, vm_id in found.groupdict().items()}
            again = set(new.values()) & set(self._ids.values())
            assert not again, f"{where} {line!r} speaks of another VM than before:\n{self._output}"
            self._ids |= new

    def _pattern(self, line: str) -> str:
        """A regular expression; VMs not seen before are its groups."""
        pattern, end, new = "", 0, set()
        for part in _VARYING.finditer(line):
            pattern += _words(line[end : part.start()])
            end = part.end()
            vm_id = part["id"]
            if vm_id is None:
                pattern += ".*" if part["any"] else r"[\d.]+"
            elif vm_id in self._ids:
                pattern += re.escape(self._ids[vm_id])
            elif vm_id in new:
                pattern += f"(?P={vm_id.replace('-', '_')})"
            else:
                new.add(vm_id)
                pattern += f"(?P<{vm_id.replace('-', '_')}>vm-[0-9a-f]{{8}})"
        return pattern + _words(line[end:])


def _match(pattern: re.Pattern[str], line: str, expected: str) -> re.Match[str] | None:
    told, shown = _STARTED.search(line), _STARTED.search(expected)
    if not (told and shown):
        return pattern.search(line)
    if sum(map(int, told.groups())) != sum(map(int, shown.groups())):
        return None
    return pattern.search(_STARTED.sub(shown[0], line))


def _words(text: str) -> str:
    """``text``, whose runs of blanks stand for any number of them."""
    return re.sub(r"(\\ )+", r"\\s+", re.escape(text))


@pytest.mark.parametrize("guide", sorted(path.name for path in GUIDES.glob("*.md")))
def test_what_a_guide_says_happens(
    guide: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a guide says of building an image happens when it is built for the first time.
    state = request.getfixturevalue("never_built" if guide == "images.md" else "no_vms")
    # Where the platform keeps such things, as for a reader, so that no line needs --state-dir.
    home = tmp_path / "state-home"
    home.mkdir()
    (home / "pytest-smolvm").symlink_to(state)
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    monkeypatch.delenv("SMOLVM_STATE_DIR")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "project"
    folder.mkdir()
    reader = Reader(folder)
    reader.read((GUIDES / guide).read_text())
    assert reader.commands_run


def test_a_guide_that_is_wrong_is_found_out(tmp_path: Path) -> None:
    right = "```python\n# a.py\nprint('one vm-0000aaaa, 1.25 s')\n```\n"
    right += "```console\n$ python3 a.py\none vm-11112222, 9.99 s\n```\n"
    right += "```console\n$ echo 2 booted, 1 restored, x\n0 booted, 3 restored, x\n```\n"
    right += "```console\n$ echo vm-11112222\nvm-11112222\n```\n```text\nvm-11112222\n```\n"
    Reader(tmp_path).read(right)
    for wrong, told in [
        ("```console\n$ echo one\ntwo\n```\n", "no 'two'"),
        ("```console\n$ echo one\none\n```\n```text\ntwo\n```\n", "no 'two'"),
        ("```console\n$ printf 'a\\nb\\n'\nb\na\n```\n", "no 'a'"),
        ("```console\n$ echo 2 booted, 1 restored\n1 booted, 1 restored\n```\n", "no '1 boo"),
        (right.replace("\nvm-11112222", "\nvm-33334444"), "speaks of another VM"),
    ]:
        with pytest.raises(AssertionError, match=told):
            Reader(tmp_path).read(wrong)
