"""``get()`` from a guest that lies: nothing is written outside the target."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_smolvm import SmolVM, SmolVMError, VMConfig


def archive(*members: tuple[str, dict[str, object], bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, fields, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in fields.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def link_to(target: str, kind: bytes = tarfile.SYMTYPE) -> dict[str, object]:
    return {"type": kind, "linkname": target}


@pytest.fixture(scope="module")
def liar(micro: tuple[Path, Path]) -> Iterator[SmolVM]:
    """A guest whose every command prints ``/answer``."""
    config = VMConfig(
        kernel_path=micro[0],
        rootfs_path=micro[1],
        boot_args="console=ttyS0 init=/init",
        mem_size_mib=256,
    )
    with SmolVM(config) as vm:
        script = (
            '#!/bin/sh\ncase "$2" in *"> /answer"*) exec /bin/sh -c "$2";; esac\nexec cat /answer\n'
        )
        vm.write_text("/liar", script)
        vm.run("chmod +x /liar; echo /liar >> /etc/shells", check=True)
        vm.run("sed -i '/^root/s,[^:]*$,/liar,' /etc/passwd", check=True)
        vm.close()
        yield vm


def lie(liar: SmolVM, answer: bytes) -> None:
    liar._live_guest()._executor("lie", 60)("cat > /answer", answer, bytes)


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        (b"tree\n" + archive(("../escape", {}, b"x")), "leads out of the target"),
        (b"tree\n" + archive(("/tmp/escape", {}, b"x")), "leads out of the target"),
        (b"tree\n" + archive(("a", link_to(".."), b""), ("a/escape", {}, b"x")), ""),
        (b"tree\n" + archive(("a", link_to("../escape"), b""), ("a", {}, b"x")), ""),
        (b"tree\n" + archive(("h", link_to("../outside", tarfile.LNKTYPE), b"")), "leads out"),
        (b"tree\n" + archive(("d", {"type": tarfile.CHRTYPE, "devmajor": 1}, b"")), ""),
        (b"tree\n" + archive(("p", {"type": tarfile.FIFOTYPE}, b"")), ""),
        (b"tree\n" + archive(("a\n\x1b[31m", {}, b"x")), ""),
        (b"tree\n" + archive(("x" * 300, {}, b"x")), "File name too long"),
        (b"tree\n" + os.urandom(5000), "ends too early"),
        (b"tree\n" + archive(("f", {}, b"x" * 5000))[:2000], "unexpected end of data"),
        (b"tree\n", "ends too early"),
        (b"tree\n" + archive(("f", {}, b"x" * 500))[:1024], "ends too early"),
        (b"tree\n" + archive(("f", {}, b"x"))[:1024] + os.urandom(5000), "ends too early"),
        (b"", "neither a file nor a tree"),
        (b"file\nnonsense\nx", "neither a file nor a tree"),
        (b"file\n" + b"7" * 10_000_000, "neither a file nor a tree"),
        (b"x" * 10_000_000, "neither a file nor a tree"),
        (b"file\n6777\nx", ""),
    ],
)
def test_whatever_a_guest_sends_for_a_tree_stays_in_the_target(
    liar: SmolVM, tmp_path: Path, answer: bytes, refused: str
) -> None:
    target = tmp_path / "box" / "target"
    target.mkdir(parents=True)
    (tmp_path / "box/outside").write_text("mine")
    lie(liar, answer)
    if refused:
        with pytest.raises(SmolVMError, match=refused):
            liar.get("/tree", target)
    else:
        liar.get("/tree", target)
    assert (tmp_path / "box/outside").read_text() == "mine"
    assert sorted(path.name for path in (tmp_path / "box").iterdir()) == ["outside", "target"]
    assert not Path("/tmp/escape").exists()
    for path in target.rglob("*"):
        mode = path.lstat().st_mode
        assert stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
        assert not mode & (stat.S_ISUID | stat.S_ISGID)


def test_bytes_that_stand_for_any_number_of_others_are_refused(
    liar: SmolVM, tmp_path: Path
) -> None:
    holes = tmp_path / "holes"
    with holes.open("wb") as file:
        file.truncate(1 << 40)
    packed = subprocess.run(
        ["tar", "-cSf", "-", "-C", tmp_path, "holes"], capture_output=True, check=True
    ).stdout
    lie(liar, b"tree\n" + packed)
    with pytest.raises(SmolVMError, match="stored with holes"):
        liar.get("/tree", tmp_path / "target")
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 30
    lie(liar, b"tree\n" + header.tobuf() + bytes(100_000))
    with pytest.raises(SmolVMError, match=r"a header of type b'x' has 1073741824 bytes"):
        liar.get("/tree", tmp_path / "target")
