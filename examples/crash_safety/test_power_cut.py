"""What is left after the power is cut: a question that no mock can answer."""

import pytest

pytestmark = pytest.mark.smolvm(mem_size_mib=256)


def test_what_was_synced_survives_a_power_cut(smolvm):
    smolvm.run("echo precious > /root/data && sync", check=True)
    smolvm.reboot(force=True)  # like the reset button: nobody in there is asked
    assert smolvm.read_text("/root/data") == "precious\n"


def test_memory_does_not_survive_it(smolvm):
    smolvm.run("echo fleeting > /dev/shm/data", check=True)
    smolvm.reboot(force=True)
    assert not smolvm.run("cat /dev/shm/data").ok
