"""python -m tests.faults.kills --kills 200: kill -9 at random moments, and look what is left.

After each kill: does anything live, is anything locked, is an image or a template not what was
made, is a kept disk gone, and does the next run pass? One line per point of attack; exit status 1
if anything was not as promised.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.conftest import COMMAND
from tests.faults import scene
from tests.faults.scene import Findings, Scene, descendants

_RUN_TIMEOUT_S = 300
_NOT_NEEDED = ("cacheprovider", "anyio", "asyncio", "hypothesispytest", "rerunfailures", "timeout")
_ALL = (sys.executable, "-m", "pytest", "-q", *(f"-pno:{name}" for name in _NOT_NEEDED))
_PASSES = (*_ALL, "-k", "test_passes")
_ON_TWO = (*_ALL, "-n2")
_APP = (str(COMMAND), "image", "build", "app")

Victims = Callable[[psutil.Process], list[psutil.Process]]


def _itself(process: psutil.Process) -> list[psutil.Process]:
    return [process]


def _workers(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "-c" in child.cmdline()[:4]]


def _machines(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children(recursive=True) if "qemu-system" in child.name()]


@dataclass
class Point:
    """What is killed, in the course of what, and what comes next."""

    name: str
    command: tuple[str, ...]
    victims: Victims = _itself
    before: Callable[[Scene], object] = lambda _: None
    next_run: tuple[str, ...] = _PASSES
    kills: int = 0
    whole_s: float = 0.0
    slowest_end_s: float = 0.0
    findings: Findings = field(default_factory=Findings)


def points() -> list[Point]:
    """All points of attack."""
    return [
        Point("pytest", _ALL),
        Point("controller of xdist", _ON_TWO),
        Point("worker of xdist", _ON_TWO, _workers),
        Point("QEMU", _ALL, _machines),
        Point("image build", _APP, before=Scene.forget_images, next_run=_APP),
        Point("template making", _ALL, before=Scene.forget_templates),
    ]


def run_whole(scene_: Scene, point: Point) -> None:
    """How long it takes undisturbed, so that kills may come at any moment of it."""
    point.before(scene_)
    began = time.monotonic()
    with scene_.start(*point.command) as process:
        output = process.communicate(timeout=_RUN_TIMEOUT_S)[0]
    if process.returncode not in (0, 1) or "error" in output.splitlines()[-1]:
        raise SystemExit(f"{point.name}: it does not even work undisturbed:\n{output}")
    point.whole_s = time.monotonic() - began
    undisturbed = Findings()
    scene_.check(undisturbed)
    if undisturbed.all():
        raise SystemExit(f"{point.name}: undisturbed, and yet: {undisturbed.all()}")


def kill_once(
    scene_: Scene, point: Point, moment_s: float, grace_s: float
) -> tuple[bool, Findings]:
    """Whether there was anybody to kill still, and what was wrong after it."""
    findings = Findings()
    point.before(scene_)
    with scene_.start(*point.command) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment_s)
        victims = _find_victims(process, point)
        # Whoever is under a victim must go with it; the victim's siblings may well go on.
        doomed = [*victims, *(child for victim in victims for child in _under(victim))]
        for victim in victims:
            victim.kill()
        if victims and point.victims is not _itself:
            took_s, living = scene.wait_for_end(lambda: _alive(doomed), grace_s)
            point.slowest_end_s = max(point.slowest_end_s, took_s)
            findings.living += living
        try:
            output = process.communicate(timeout=_RUN_TIMEOUT_S)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0]
            findings.next_run.append(f"the run did not end: {output[-2000:]}")
    # execnet's own trouble with a worker that is killed while it starts is not ours.
    if "INTERNALERROR" in output and "in setup_nodes" not in output:
        findings.next_run.append(f"the run broke: {output[-3000:]}")
    took_s, living = scene.wait_for_end(descendants, grace_s)
    point.slowest_end_s = max(point.slowest_end_s, took_s)
    findings.living += living
    _reap()
    scene_.check(findings)
    _run_next(scene_, point, findings)
    return bool(victims), findings


def _find_victims(process: subprocess.Popen[str], point: Point) -> list[psutil.Process]:
    """One that is there, or the first to come; none if the run ends before."""
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if found := point.victims(psutil.Process(process.pid)):
                return [random.choice(found)]  # noqa: S311 - no secret
        time.sleep(0.002)
    return []


def _under(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    alive = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _run_next(scene_: Scene, point: Point, findings: Findings) -> None:
    with scene_.start(*point.next_run) as process:
        output = process.communicate(timeout=_RUN_TIMEOUT_S)[0]
    if process.returncode:
        findings.next_run.append(f"the next run failed ({process.returncode}): {output[-3000:]}")
    scene_.check(findings)
    scene_.check_next(findings)


_COLUMNS = "{:<21}{:>7}{:>12}{:>10}{:>8}{:>9}{:>6}{:>10}"


def table(done: list[Point]) -> str:
    """One line per point."""
    heads = ("killed", "kills", "live after", "slowest", "locked", "corrupt", "lost", "next run")
    lines = [_COLUMNS.format(*heads)]
    for point in done:
        found = point.findings
        counts = [len(part) for part in (found.locked, found.corrupt, found.lost, found.next_run)]
        slowest = f"{point.slowest_end_s * 1000:.0f} ms"
        lines.append(_COLUMNS.format(point.name, point.kills, len(found.living), slowest, *counts))
    return "\n".join(lines)


def attack(scene_: Scene, kills: int, grace_s: float, *, verbose: bool) -> list[Point]:
    """Spread the kills over all points, until there were so many, or somebody presses Ctrl-C."""
    scene_.keep_a_disk()
    attacked = points()[:kills]
    for point in attacked:
        run_whole(scene_, point)
    done = 0
    with contextlib.suppress(KeyboardInterrupt):
        while done < kills:
            point = min(attacked, key=lambda point: point.kills)
            moment_s = random.uniform(0, point.whole_s)  # noqa: S311 - a moment, no secret
            was_alive, findings = kill_once(scene_, point, moment_s, grace_s)
            point.findings.add(findings)
            point.kills += was_alive
            if not was_alive:
                point.whole_s *= 0.9  # the machine is quicker by now
            done += was_alive
            if verbose or findings.all():
                said = "\n  ".join(findings.all()) or "as promised"
                at = f"at {moment_s:.2f} s" if was_alive else "too late"
                print(f"{done}: {point.name} {at}: {said}", flush=True)
    return attacked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--grace-s", type=float, default=2.0, help="for what was owned to die")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--open", type=int, default=5, help="how many kept disks to boot at last")
    parser.add_argument("-v", "--verbose", action="store_true")
    options = parser.parse_args()
    random.seed(options.seed)
    scene.adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="smolvm-kills-") as folder:
        place = Scene(Path(folder))
        done = attack(place, options.kills, options.grace_s, verbose=options.verbose)
        opened, wrong = place.open_kept(options.open)
    print(table(done))
    print(f"seed {options.seed}; live after: {options.grace_s:g} s")
    print(f"{opened} of the kept disks were booted: {len(wrong)} were not as they were left")
    found = [*wrong, *(text for point in done for text in point.findings.all())]
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
