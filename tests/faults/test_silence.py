"""Guests and machines that do not answer: each wait ends, and its error says what it was for."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_smolvm import OperationTimeoutError, SmolVM, SmolVMError, VMConfig, VMState
from pytest_smolvm.backends import console, qmp
from pytest_smolvm.images.guestfiles import COMPANION
from tests.conftest import qemu_pids

CONSOLE = "--- last lines of the console ---"


@pytest.fixture
def vm(micro_config: VMConfig, no_vms: Path) -> Iterator[SmolVM]:
    """A guest to be spoilt, of which nothing may be left."""
    with SmolVM(micro_config) as vm:
        yield vm
    assert qemu_pids() == set()
    assert list((no_vms / "vms").iterdir()) == []


@pytest.fixture
def frozen(vm: SmolVM) -> Iterator[SmolVM]:
    """One whose QEMU was stopped by a signal."""
    (pid,) = qemu_pids()
    os.kill(pid, signal.SIGSTOP)
    yield vm
    if pid in qemu_pids():
        os.kill(pid, signal.SIGCONT)


def test_a_command_in_a_machine_that_is_stopped_says_so(frozen: SmolVM) -> None:
    (pid,) = qemu_pids()
    with pytest.raises(OperationTimeoutError) as caught:
        frozen.run("true", timeout=2)
    said = str(caught.value)
    assert said.startswith("the command 'true' was not done within 2 s: ")
    assert f"process {pid} is stopped by a signal (kill -CONT {pid} lets it go on)" in said
    assert CONSOLE in said
    assert not frozen.answers(1)
    os.kill(pid, signal.SIGCONT)
    assert frozen.run("echo on", timeout=60).output == "on"


def test_a_silent_monitor_is_an_error_and_not_the_end(
    frozen: SmolVM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pid,) = qemu_pids()
    for ask in (frozen.pause, lambda: frozen.expose_local(80)):
        with monkeypatch.context() as patch:
            patch.setattr(qmp, "COMMAND_TIMEOUT_S", 1.0)
            with pytest.raises(OperationTimeoutError) as caught:
                ask()
        said = str(caught.value)
        assert re.match(r"QEMU's monitor command \S+ was not done within 1 s", said)
        assert f"process {pid} is stopped" in said
        assert CONSOLE in said
    os.kill(pid, signal.SIGCONT)
    frozen.resume()  # it does now what it was asked to
    assert frozen.run("echo on", timeout=60).output == "on"


def test_a_machine_that_is_stopped_can_be_switched_off(
    frozen: SmolVM, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        frozen.stop(timeout=2)
    assert frozen.status is VMState.STOPPED
    assert "did not switch itself off within 2 s: it is ended by force" in caplog.text
    assert qemu_pids() == set()


def test_a_machine_that_is_stopped_can_be_kept(frozen: SmolVM) -> None:
    kept = frozen.retain("to be looked at")
    assert qemu_pids() == set()
    vm = SmolVM.from_id(frozen.vm_id)
    assert (kept / "README.txt").exists()
    vm._retained = None
    vm.delete()


def test_a_machine_that_is_stopped_while_it_boots(micro_config: VMConfig, no_vms: Path) -> None:
    vm = SmolVM(micro_config, restore=False)

    def stop() -> None:
        while not vm.console:
            pass
        (pid,) = qemu_pids()
        os.kill(pid, signal.SIGSTOP)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(OperationTimeoutError, match="is stopped by a signal") as caught:
        vm.start(boot_timeout=5)
    thread.join()
    assert caught.value.timeout_s == 5
    assert CONSOLE in str(caught.value)
    assert qemu_pids() == set()
    assert list((no_vms / "vms").iterdir()) == []


def test_a_guest_that_stops_reading(vm: SmolVM, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(32 << 20))
    vm.run("(sleep 1; kill -STOP $(pidof dropbear)) >/dev/null 2>&1 &")
    with pytest.raises(OperationTimeoutError) as caught:
        vm.put(big, "/root/big", timeout=4)
    assert str(caught.value).startswith(f"put {big} to /root/big was not done within 4 s: ")
    assert CONSOLE in str(caught.value)


def test_a_guest_that_takes_connections_and_says_nothing(vm: SmolVM) -> None:
    vm.run("(sleep 1; kill -STOP $(pidof dropbear)) >/dev/null 2>&1 &")
    with pytest.raises(SmolVMError):
        vm.run("sleep 30", timeout=3)
    vm.close()
    with pytest.raises(OperationTimeoutError) as caught:
        vm.run("true", timeout=2)
    said = str(caught.value)
    assert said.startswith("the command 'true' was not done within 2 s: ")
    assert "the connection was accepted, but no SSH server spoke" in said
    assert CONSOLE in said
    with pytest.raises(OperationTimeoutError, match=r"port 80 .* within 2 s.*no SSH server spoke"):
        vm.wait_for_port(80, timeout=2)


def test_a_guest_that_ignores_power_off(vm: SmolVM, caplog: pytest.LogCaptureFixture) -> None:
    vm.write_text(f"{COMPANION}/bin/poweroff", "#!/bin/sh\n")
    vm.run(f"chmod +x {COMPANION}/bin/poweroff", check=True)
    with caplog.at_level(logging.WARNING):
        vm.stop(timeout=3)
    assert vm.status is VMState.STOPPED
    assert "did not switch itself off within 3 s: it is ended by force" in caplog.text


def test_a_flood_on_the_console_ends_with_its_command(
    vm: SmolVM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LIMIT_BYTES", 400_000)
    monkeypatch.setattr(console, "KEPT_HEAD_BYTES", 50_000)
    monkeypatch.setattr(console, "KEPT_TAIL_BYTES", 100_000)
    with pytest.raises(OperationTimeoutError, match="it was killed in the guest"):
        vm.run("yes 'a flood' | head -c 10000000000 > /dev/console", timeout=8)
    log = vm.directory / "console.log"
    assert log.stat().st_size < 500_000
    assert "KiB are left out here" in vm.console
    assert vm.console.startswith("[    0.0")
    vm.run("echo the last words > /dev/console")
    assert "the last words" in vm.console[-200:]


def test_output_that_no_memory_holds_is_refused(
    vm: SmolVM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_smolvm import command

    monkeypatch.setattr(command, "OUTPUT_LIMIT_BYTES", 2 << 20)
    # One line, and no end.
    with pytest.raises(SmolVMError, match=r"printed more than 2 MiB and was killed.*get\(\)"):
        vm.run("cat /dev/zero", timeout=120)
    assert "cat" not in vm.run("ps").stdout
    vm.run("head -c 3000000 /dev/zero > /root/long")
    with pytest.raises(SmolVMError, match=r"has more than 2 MiB: use get\(\)"):
        vm.read_text("/root/long")
