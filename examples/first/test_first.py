"""The smallest test there is: it takes `smolvm`, and so has a machine of its own."""


def test_a_command_in_a_machine_of_its_own(smolvm):
    assert smolvm.run("echo hello from $(hostname)").output == f"hello from {smolvm.vm_id}"
