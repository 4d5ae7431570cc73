"""An installer, tried for real: it may change all it wants, nobody's machine is harmed."""

from pathlib import Path

import pytest

INSTALLER = Path(__file__).with_name("my-installer")

pytestmark = pytest.mark.smolvm(mem_size_mib=256)


@pytest.fixture
def machine(smolvm):
    """A machine that has the installer, but has not run it."""
    smolvm.put(INSTALLER, "/root/")
    return smolvm


@pytest.mark.smolvm(env_vars={"MODE": "test"})
def test_the_tool_is_there_after_the_installation(machine):
    assert not machine.run("my-tool").ok
    assert machine.run("./my-installer --yes").ok
    assert machine.run("my-tool").output == "my-tool in test mode"


def test_nothing_is_installed_without_consent(machine):
    before = machine.run("find / -xdev | sort").stdout
    result = machine.run("./my-installer")
    assert result.exit_code == 2
    assert "usage" in result.stderr
    assert machine.run("find / -xdev | sort").stdout == before
