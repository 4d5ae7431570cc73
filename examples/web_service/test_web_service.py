"""A service in a machine of its own, talked to from the test's side."""

import urllib.request

import pytest


@pytest.fixture
def address(smolvm):
    """A web server in the guest, and where this host reaches it."""
    smolvm.write_text("/srv/www/index.html", "It works!\n")
    smolvm.run("httpd -p 80 -h /srv/www", check=True)
    smolvm.wait_for_port(80)
    return f"http://127.0.0.1:{smolvm.expose_local(80)}/"


@pytest.mark.smolvm(mem_size_mib=256)
def test_the_service_answers_from_inside_the_machine(address):
    with urllib.request.urlopen(address, timeout=10) as response:
        assert response.read() == b"It works!\n"


@pytest.mark.smolvm(mem_size_mib=256)
def test_two_machines_do_not_share_a_service(address, smolvm_factory):
    other = smolvm_factory()
    assert not other.run("wget -q -O - http://127.0.0.1/").ok
