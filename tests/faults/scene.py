"""Where faults are injected: a state directory, a project with tests, what must be true of both.

Nothing here is a test; ``kills`` and ``soak`` are run with it, and tests run those.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pytest_smolvm import SSH_BOOT_ARGS, ImageBuilder, SmolVM, VMConfig
from pytest_smolvm.inventory import inventory
from pytest_smolvm.statedir import default_state_dir
from pytest_smolvm.store import Store
from pytest_smolvm.templates import TemplateError, Templates

CANARY = "/root/canary"
_PR_SET_CHILD_SUBREAPER = 36

TESTS = f"""
import os, pathlib, pytest

def test_fails_and_its_vm_is_kept(smolvm):
    smolvm.write_text("{CANARY}", "of the test that failed")
    smolvm.run("sync", check=True)
    pathlib.Path(os.environ["SYNCED"], smolvm.vm_id).touch()
    assert not "a fault"

def test_comes_after_it():
    if "PYTEST_XDIST_WORKER" not in os.environ:  # else it may be run beside it
        pathlib.Path(os.environ["KEPT_ONE"]).touch()

@pytest.mark.parametrize("number", range(3))
def test_passes(smolvm, number):
    assert not smolvm.run("test -e {CANARY}").ok
    smolvm.write_text("{CANARY}", str(number))
    assert smolvm.read_text("{CANARY}") == str(number)
"""

RECIPE = """
[tool.pytest.ini_options]
smolvm_backend = "qemu"
smolvm_mem_size_mib = "128"
# What is kept stays: nothing goes for being old or much.
smolvm_retention_count = "100000"
smolvm_retention_max_mib = "1000000"

[tool.smolvm.images.app]
base = "micro"
run = ["echo 1 > /1", "echo 2 > /2"]
"""


@dataclass
class Findings:
    """What was wrong, in words, by kind."""

    living: list[str] = field(default_factory=list)
    locked: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    next_run: list[str] = field(default_factory=list)

    def all(self) -> list[str]:
        """All of them."""
        return [*self.living, *self.locked, *self.corrupt, *self.lost, *self.next_run]

    def add(self, other: Findings) -> None:
        """Take in those of another."""
        for name in ("living", "locked", "corrupt", "lost", "next_run"):
            getattr(self, name).extend(getattr(other, name))


class Scene:
    """A host's state directory and a user's project, both new."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.project = folder / "project"
        self.marker = folder / "kept-one"
        self.synced = folder / "synced"
        self.synced.mkdir()
        self._kept: dict[str, dict[str, str]] = {}
        self.state.mkdir(mode=0o700)
        self.project.mkdir()
        (self.project / "test_faults.py").write_text(TESTS)
        (self.project / "pyproject.toml").write_text(RECIPE)
        # Downloaded packages are what they are; the images made of them are made anew.
        packages = default_state_dir() / "images" / "debian"
        packages.mkdir(parents=True, exist_ok=True)
        (self.state / "images").mkdir(mode=0o700)
        (self.state / "images" / "debian").symlink_to(packages)
        os.environ["SMOLVM_STATE_DIR"] = str(self.state)
        os.environ["KEPT_ONE"] = str(self.marker)
        os.environ["SYNCED"] = str(self.synced)
        self.store = Store(self.state)
        self.precious = ""

    def keep_a_disk(self) -> None:
        """Have a VM kept that no run and no kill may touch."""
        kernel, rootfs = ImageBuilder(progress=lambda _: None).build("micro")
        config = VMConfig(
            kernel_path=kernel, rootfs_path=rootfs, boot_args=SSH_BOOT_ARGS, mem_size_mib=128
        )
        vm = SmolVM(config).start()
        vm.write_text(CANARY, "precious")
        vm.run("sync", check=True)
        vm.retain("it is precious")
        self.precious = vm.vm_id

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A process of the user's, at the head of a session of its own."""
        return subprocess.Popen(
            command,
            cwd=self.project,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def check(self, findings: Findings) -> None:
        """Add what is locked, corrupt or lost, now that nobody runs."""
        findings.locked += [f"{path} is locked" for path in self._locked()]
        findings.corrupt += [*self._corrupt_images(), *self._corrupt_templates()]
        findings.lost += self._lost()

    def check_next(self, findings: Findings) -> None:
        """Add what the next run left that the one before it had begun."""
        kept = {entry.vm_id for entry in inventory(self.store) if entry.record.is_kept}
        left = {path.name for path in self.store.vms.iterdir()} - kept
        findings.next_run += [f"the next run left {name}" for name in sorted(left)]

    def forget_images(self) -> None:
        """Have the next who asks for the images build them."""
        self._remove("images", "app-*")

    def forget_templates(self) -> None:
        """Have the next VM be booted."""
        self._remove("templates", "*")

    def open_kept(self, limit: int) -> tuple[int, list[str]]:
        """Boot kept disks, the precious one first: how many, and what was not as it was left.

        Of the others, those whose guest had been asked to write them before it came to an end.
        """
        wrong = []
        written = {path.name for path in self.synced.iterdir()}
        names = [self.precious, *sorted(set(self._kept) & written)][: limit + 1]
        for name in names:
            wanted = "precious" if name == self.precious else "of the test that failed"
            with SmolVM.from_id(name) as vm:
                said = vm.read_text(CANARY)
                vm.retain("looked at")
            if said != wanted:
                wrong.append(f"{name}: {said!r} in the place of {wanted!r}")
        return len(names), wrong

    def _remove(self, folder: str, pattern: str) -> None:
        for path in (self.state / folder).glob(pattern):
            subprocess.run(["rm", "-rf", path], check=True)

    def _locked(self) -> Iterator[Path]:
        for pattern in (
            "*.lock",
            "vms/*/lock",
            "images/*.lock",
            "templates/**/*lock",
            "keys/*.lock",
        ):
            for path in self.state.glob(pattern):
                with path.open("rb") as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except OSError:
                        yield path

    def _corrupt_images(self) -> Iterator[str]:
        for image in (self.state / "images").glob("[!.]*/"):
            digests = image / "digests.json"
            if image.is_symlink() or not any(image.glob("rootfs.*")):
                continue
            if not digests.exists():
                yield f"{image.name} has no digests"
                continue
            for name, (size, _, digest) in json.loads(digests.read_text()).items():
                data = (image / name).read_bytes()
                if (len(data), hashlib.sha256(data).hexdigest()) != (size, digest):
                    yield f"{image.name}/{name} is not what was built"

    def _corrupt_templates(self) -> Iterator[str]:
        templates = Templates(self.store)
        for path in templates.root.glob("[!.]*/"):
            try:
                if templates.find(path.name) is None:
                    yield f"the template {path.name} is not there"
            except TemplateError as error:
                yield str(error)

    def _lost(self) -> list[str]:
        """Kept disks that are gone or changed; new ones are known from now on."""
        there = {
            entry.vm_id: {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in entry.path.glob("*.qcow2")
            }
            for entry in inventory(self.store)
            if entry.record.is_kept
        }
        lost = []
        for vm_id, disks in self._kept.items():
            if there.get(vm_id) != disks:
                lost.append(f"the kept VM {vm_id}: its disks were {disks}, are {there.get(vm_id)}")
        new = set(there) - set(self._kept)
        if self.marker.exists():
            self.marker.unlink()
            if not new:
                lost.append("the VM of the test that had failed was not kept")
        for vm_id in new:
            done = subprocess.run(
                ["qemu-img", "check", self.store.vms / vm_id / "disk.qcow2"],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                lost.append(f"the disk of {vm_id} is damaged: {done.stdout}{done.stderr}")
        self._kept = there
        return lost


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies (prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")


def descendants(of: int | None = None) -> list[psutil.Process]:
    """All living processes under one; zombies are dead."""
    alive = []
    for process in psutil.Process(of).children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
        except psutil.NoSuchProcess:
            continue
    return alive


def wait_for_end(
    living: Callable[[], list[psutil.Process]], grace_s: float
) -> tuple[float, list[str]]:
    """How long it took until none lived, and who lived on past ``grace_s`` seconds."""
    began = time.monotonic()
    while still := living():
        if time.monotonic() - began > grace_s:
            said = [describe(process) for process in still]
            for process in still:
                process.kill()
            return time.monotonic() - began, said
        time.sleep(0.005)
    return time.monotonic() - began, []


def describe(process: psutil.Process) -> str:
    """A process in one line."""
    try:
        return f"process {process.pid} lives on: {' '.join(process.cmdline())[:120]}"
    except psutil.Error:
        return f"process {process.pid} lived on"
