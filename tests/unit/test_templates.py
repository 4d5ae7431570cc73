"""Templates as files: whole or not there, used while they are right, swept when nobody does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pytest_smolvm import templates as module
from pytest_smolvm.store import Store
from pytest_smolvm.templates import Template, TemplateError, TemplateFacts, Templates


@pytest.fixture
def templates(tmp_path: Path) -> Templates:
    return Templates(Store(tmp_path / "state"))


def facts(key: str) -> TemplateFacts:
    return TemplateFacts(
        key=key,
        vm_id="vm-1",
        config={},
        ssh_user="root",
        ssh_key_path=None,
        accelerator="tcg",
        made_by=["qemu"],
        layers=["layer.qcow2"],
        disk=["/image", 1, 2],
    )


def make(templates: Templates, key: str, size: int = 1 << 20) -> Template:
    def write(target: Path) -> TemplateFacts:
        with (target / "memory").open("wb") as file:
            file.truncate(size)
            file.seek(size // 2)
            file.write(b"contents of the memory" * 1000)
        (target / "state").write_bytes(b"state")
        return facts(key)

    return templates.make(key, write)


def as_in_another_process() -> None:
    module._checked.clear()


def test_what_was_made_is_found_and_whole(templates: Templates) -> None:
    made = make(templates, "a")
    as_in_another_process()
    found = templates.find("a")
    assert found is not None
    assert found.facts == made.facts
    assert set(found.facts.files) == {"memory", "state"}
    assert templates.find("b") is None


@pytest.mark.parametrize("name", ["memory", "state"])
@pytest.mark.parametrize("damage", ["truncated", "a bit", "a bit in a hole", "gone"])
def test_damage_is_seen(templates: Templates, name: str, damage: str) -> None:
    path = make(templates, "a").path / name
    size = path.stat().st_size
    if damage == "truncated":
        os.truncate(path, size - 1)
    elif damage == "gone":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.seek(size // 2 + 1 if damage == "a bit" else 1)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    as_in_another_process()
    with pytest.raises(TemplateError, match=name):
        templates.find("a")


def test_a_hole_that_somebody_filled_with_zeros_is_no_damage(templates: Templates) -> None:
    memory = make(templates, "a").path / "memory"
    with memory.open("r+b") as file:
        file.write(bytes(100_000))
    as_in_another_process()
    assert templates.find("a") is not None


def test_facts_that_cannot_be_read_are_an_error_that_names_the_template(
    templates: Templates,
) -> None:
    path = make(templates, "a").path
    (path / "template.json").write_text("{}")
    with pytest.raises(TemplateError, match=r"template a .*template\.json"):
        templates.find("a")


def test_contents_are_read_once_per_process(
    templates: Templates, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(templates, "a")
    as_in_another_process()
    measured: list[Path] = []
    real = module._measure
    monkeypatch.setattr(module, "_measure", lambda path: measured.append(path) or real(path))
    for _ in range(3):
        templates.find("a")
    assert len(measured) == 2


def test_one_that_cannot_be_finished_leaves_nothing(templates: Templates) -> None:
    def write(target: Path) -> TemplateFacts:
        (target / "memory").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(TemplateError, match="No space"):
        templates.make("a", write)
    assert list(templates.root.iterdir()) == []


def test_leftovers_of_a_killed_maker_are_cleared_by_the_next(templates: Templates) -> None:
    leftover = templates.root / ".a.1234"
    leftover.mkdir()
    (leftover / "memory").write_bytes(b"half")
    make(templates, "a")
    assert not leftover.exists()


def test_one_makes_while_others_wait_and_then_need_not(templates: Templates) -> None:
    holds, may_end, told = threading.Event(), threading.Event(), []

    def first() -> None:
        with templates.making("a", 10, lambda: None) as may_make:
            assert may_make
            holds.set()
            assert may_end.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    assert holds.wait(10)
    with templates.making("a", 10, may_end.set) as may_make:
        told.append(may_make)
    with templates.making("b", 10, lambda: None) as may_make:
        told.append(may_make)
    thread.join()
    assert told == [False, True]


def test_whoever_waits_too_long_goes_on_without(templates: Templates) -> None:
    with (
        templates.making("a", 10, lambda: None) as first,
        templates.making("a", 0.05, lambda: None) as second,
    ):
        assert (first, second) == (True, False)


def age(template: Template, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(template.path / "template.json", (then, then))


def test_what_was_not_used_for_long_is_swept(templates: Templates) -> None:
    old, young = make(templates, "old"), make(templates, "young")
    age(old, (module.MAX_AGE_DAYS + 1) * 86400)
    age(young, (module.MAX_AGE_DAYS - 1) * 86400)
    assert templates.sweep() == ["old"]
    assert not old.path.exists()
    assert young.path.exists()


def test_use_keeps_a_template_young(templates: Templates) -> None:
    template = make(templates, "a")
    age(template, (module.MAX_AGE_DAYS + 1) * 86400)
    templates.find("a")
    assert templates.sweep() == []


def test_what_is_too_much_is_swept_the_longest_unused_first(
    templates: Templates, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [make(templates, key) for key in ("a", "b", "c")]
    for number, template in enumerate(made):
        age(template, (10 - number) * 3600)
    one = sum(path.stat().st_blocks * 512 for path in made[0].path.iterdir())
    monkeypatch.setattr(module, "MAX_TOTAL_BYTES", 2 * one)
    assert templates.sweep() == ["a"]
    # One that is in use stays, whatever the budget.
    monkeypatch.setattr(module, "MAX_TOTAL_BYTES", 0)
    age(made[2], 10)
    assert templates.sweep() == ["b"]


def test_a_template_of_this_process_goes_with_it(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from pytest_smolvm.store import Store
from pytest_smolvm.templates import Templates
from tests.unit.test_templates import facts
import os, sys
def write(target):
    (target / "memory").write_bytes(b"x")
    return facts("own")
template = Templates(Store(Path({str(tmp_path / "state")!r}))).make_owned(write)
assert template.path.is_dir()
print(template.path, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
"""
    root = Path(__file__).parents[2]

    def run(how: str) -> Path:
        done = subprocess.run(
            [sys.executable, "-c", script, how],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        return Path(done.stdout.strip())

    assert not run("ends").exists()
    left = run("killed")
    assert left.exists()
    templates = Templates(Store(tmp_path / "state"))
    assert templates.sweep() == [left.parent.name]
    assert not left.exists()


def test_a_template_of_a_living_process_is_not_swept(templates: Templates) -> None:
    def write(target: Path) -> TemplateFacts:
        return facts("own")

    template = templates.make_owned(write)
    script = (
        "from pytest_smolvm.store import Store; from pytest_smolvm.templates import Templates;"
        "from pathlib import Path;"
        f"print(Templates(Store(Path({str(templates.root.parent)!r}))).sweep())"
    )
    swept = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert swept == "[]\n"
    template.delete()
    assert not template.path.exists()


def test_the_facts_hold_no_more_than_is_known(templates: Templates) -> None:
    told: dict[str, Any] = json.loads((make(templates, "a").path / "template.json").read_text())
    assert told["files"]["state"]["size"] == 5
    assert "contents" not in repr(templates.find("a"))
