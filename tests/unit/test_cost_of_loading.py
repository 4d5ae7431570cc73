"""A suite that asks for no VM pays nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import pytest
# A plugin of another's that happens to be installed here loads asyncio.
code = pytest.main(["-q", "-p", "no:anyio", *sys.argv[1:]])
heavy = ["paramiko", "pydantic", "qemu", "cryptography", "filelock", "asyncio"]
loaded = [name for name in heavy if name in sys.modules]
print("RESULT" + json.dumps({"code": code, "loaded": loaded,
      "plugin": "pytest_smolvm.plugin" in sys.modules}))
"""


@pytest.mark.parametrize("arguments", [[], ["-n1"]], ids=" ".join)
def test_a_run_without_vms_loads_no_heavy_library(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "state" / "vms").mkdir(parents=True)
    test = tmp_path / "test_plain.py"
    test.write_text("def test_plain():\n    pass\n")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(test), *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTEST_ADDOPTS": "-p no:cacheprovider -p no:asyncio -p no:rerunfailures",
            "SMOLVM_STATE_DIR": str(tmp_path / "state"),
        },
    )
    result = json.loads(done.stdout.partition("RESULT")[2])
    assert result == {"code": 0, "loaded": [], "plugin": True}


def test_the_public_names_are_all_there() -> None:
    import pytest_smolvm

    for name in pytest_smolvm.__all__:
        assert getattr(pytest_smolvm, name) is not None
        assert name in dir(pytest_smolvm)


def test_the_library_never_imports_pytest() -> None:
    names = "SmolVM, VMConfig, ImageBuilder, SSH_BOOT_ARGS, CommandResult"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; from pytest_smolvm import {names}; print('pytest' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
