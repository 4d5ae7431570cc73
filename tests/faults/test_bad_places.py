"""State directories that will not do: said before anything starts. Odd ones that will: used."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_smolvm import SmolVM, SmolVMError, VMConfig
from pytest_smolvm.store import Store
from tests.conftest import changed, cli, qemu_pids, with_shared_caches

SOMEBODY, ANOTHER = 65534, 65533
WAY_OUT = "set SMOLVM_STATE_DIR to a directory of your own on a local disk"


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can get to."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def ordinary(place: Path) -> Iterator[None]:
    """The test runs as an ordinary user, whom modes keep out."""
    if os.geteuid() != 0:
        pytest.skip("takes root, to be two users")
    assert place.exists()  # and is removed as root
    os.seteuid(SOMEBODY)
    yield
    os.seteuid(0)


@pytest.mark.usefixtures("ordinary")
def test_another_users_directory_is_not_used(place: Path) -> None:
    os.seteuid(0)
    os.chown(place, ANOTHER, ANOTHER)
    place.chmod(0o777)
    os.seteuid(SOMEBODY)
    with pytest.raises(SmolVMError, match=rf"{place} .* belongs to another user \(uid 65533\)"):
        Store(place)
    assert list(place.iterdir()) == []


@pytest.mark.usefixtures("ordinary")
@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_directory_that_may_not_be_written_to(place: Path, mode: int) -> None:
    os.seteuid(0)
    os.chown(place, SOMEBODY, SOMEBODY)
    place.chmod(mode)
    os.seteuid(SOMEBODY)
    with pytest.raises(SmolVMError, match=f"Permission denied.*{WAY_OUT}"):
        Store(place)
    with pytest.raises(SmolVMError, match="cannot be made: Permission denied; set SMOLVM_STATE"):
        Store(place / "sub")


def test_a_directory_that_everybody_may_write_to(place: Path) -> None:
    place.chmod(0o1777)
    with pytest.raises(SmolVMError, match=f"everybody may write to it; chmod 700 {place}, or set"):
        Store(place)


@pytest.mark.parametrize("kind", ["none", "of no use"])
def test_a_file_system_without_locks(
    place: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As some network file systems have none; those cannot be had here."""

    def flock(*_: Any) -> None:
        if kind == "none":
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    said = "No locks available" if kind == "none" else "locks that exclude nobody"
    with pytest.raises(SmolVMError, match=f"{said}.*{WAY_OUT}"):
        Store(place)
    assert list(place.iterdir()) == []


def test_a_file_where_the_directory_should_be(place: Path) -> None:
    (place / "file").touch()
    for path in (place / "file", place / "file/below"):
        with pytest.raises(SmolVMError, match=r"cannot be made: (File exists|Not a directory)"):
            Store(path)


MOUNTED = """
import os, subprocess, sys
from pathlib import Path
from pytest_smolvm import SmolVM, SmolVMError
from pytest_smolvm.store import Store
state = Path(os.environ["SMOLVM_STATE_DIR"])
subprocess.run(["mount", "-t", "tmpfs", "-o", sys.argv[1], "tmpfs", state], check=True)
if sys.argv[2:]:
    (state / "filler").write_bytes(bytes(int(sys.argv[2])))
try:
    Store()
except SmolVMError as error:
    print(error)
print(sorted(path.name for path in state.iterdir()))
"""


@pytest.mark.parametrize(
    ("options", "said", "left"),
    [
        (["ro,mode=700"], "Read-only file system", "[]"),
        (["mode=700,size=64k,nr_inodes=2", "65536"], "No space left on device", "['filler']"),
        (["mode=700,size=64k", "65536"], "No space left on device", "['filler']"),
    ],
)
def test_a_file_system_that_takes_nothing(
    place: Path, options: list[str], said: str, left: str
) -> None:
    unshare = shutil.which("unshare")
    assert unshare is not None
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    done = subprocess.run(
        [unshare, *user, "--mount", sys.executable, "-c", MOUNTED, *options],
        env={**os.environ, "SMOLVM_STATE_DIR": str(place)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    error, found = done.stdout.splitlines()
    assert said in error
    assert WAY_OUT in error
    assert found == left


@pytest.mark.parametrize("network", ["isolated", "nat"])
@pytest.mark.parametrize(
    "name",
    ["with spaces", "ünïcødé-☃", "a,b=c;d'e\"f$g%h&i#j", "long/" + "x" * 120, "new\nline"],
    ids=["spaces", "unicode", "punctuation", "long", "newline"],
)
def test_odd_names_are_names(
    micro_config: VMConfig,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    network: str,
) -> None:
    root = place / name
    root.mkdir(parents=True)
    with_shared_caches(root)
    monkeypatch.setenv("SMOLVM_STATE_DIR", str(root))
    paths = {
        field: root / getattr(micro_config, field).relative_to(micro_config.kernel_path.parents[2])
        for field in ("kernel_path", "rootfs_path")
    }
    config = changed(micro_config, network=network, **paths)
    with SmolVM(config) as vm:
        assert len(qemu_pids()) == 1
        vm.run("echo kept > /root/kept; sync", check=True)
        assert cli("ssh", vm.vm_id, "cat /root/kept").stdout == "kept\n"
        vm.retain("to be looked at")
    if network == "isolated":
        assert cli("ssh", vm.vm_id, "cat /root/kept").stdout == "kept\n"
    cli("rm", vm.vm_id)
    assert qemu_pids() == set()
    assert list((root / "vms").iterdir()) == []
