"""Workers of pytest-xdist, and runs side by side, on real machines."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pytest_smolvm.identity import ProcessIdentity
from pytest_smolvm.inventory import Entry, inventory
from pytest_smolvm.store import Store
from tests.conftest import cli
from tests.plugin.runs import interrupt, start, wait_for

# Machines that nobody waits for: their guests are asked for nothing, so each takes a
# fraction of a second, while directories, locks, disks and ports are those of any other.
MANY = """
import os, pytest
pytestmark = pytest.mark.smolvm(boot_args="panic=1 root=/dev/vda", mem_size_mib=128)

@pytest.mark.parametrize("number", range({count}))
def test_one(smolvm, number):
    assert smolvm.status == "running"
    with open(os.environ["TOLD"], "a") as file:
        file.write(f"{{smolvm.vm_id}} {{smolvm.expose_local(80)}}\\n")
"""


def finish(runs: list[subprocess.Popen[str]], timeout_s: float = 300) -> list[str]:
    """What each run printed; all must have passed."""
    outputs = [run.communicate(timeout=timeout_s)[0] for run in runs]
    for run, output in zip(runs, outputs, strict=True):
        assert run.returncode == 0, output
    return outputs


def test_two_runs_of_two_workers_at_once_do_not_get_in_each_others_way(
    pytester: pytest.Pytester, no_vms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = pytester.path / "told"
    monkeypatch.setenv("TOLD", str(told))
    pytester.makepyfile(MANY.format(count=100))
    outputs = finish([start("-n2") for _ in range(2)])
    for output in outputs:
        assert "100 passed" in output
    vm_ids = [line.split()[0] for line in told.read_text().splitlines()]
    assert len(vm_ids) == len(set(vm_ids)) == 200
    assert inventory(Store(no_vms)) == []


def test_an_image_is_built_once_for_all_workers_and_all_runs_at_once(
    pytester: pytest.Pytester, own_state: Path, micro: tuple[Path, Path]
) -> None:
    (own_state / "images").mkdir(parents=True)
    (own_state / "images" / "debian").symlink_to(micro[0].parents[1] / "debian")
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.parametrize("number", range(4))
        def test_one(smolvm_config, number): assert smolvm_config.rootfs_path.exists()
        """
    )
    outputs = finish([start("-n2") for _ in range(2)])
    text = "".join(outputs)
    assert text.count("image micro: making the root disk") == 1
    assert text.count("image micro: ready") == 1
    assert len(list((own_state / "images").glob("micro-*/rootfs.ext4"))) == 1
    assert "another process is building it: waiting" in text


def test_a_worker_that_is_killed_takes_its_machines_with_it(
    pytester: pytest.Pytester, no_vms: Path
) -> None:
    marker = pytester.path / "in-the-test"
    pytester.makepyfile(
        f"""
        import os, time
        from pathlib import Path

        def test_killed(smolvm, smolvm_factory):
            smolvm.run("touch /root/canary")
            smolvm_factory()
            if not os.path.exists("{marker}"):
                Path("{marker}.new").write_text(str(os.getpid()))
                os.rename("{marker}.new", "{marker}")
                time.sleep(600)
        """
    )
    with start("-n1", "--max-worker-restart=0") as run:
        wait_for(marker.exists, run)
        entries = inventory(Store(no_vms))
        assert len(entries) == 2
        machines = [ProcessIdentity.of(entry.record.machine_pid or 0) for entry in entries]
        assert None not in machines
        os.kill(int(marker.read_text()), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while any(machine and machine.is_alive() for machine in machines):
            assert time.monotonic() < deadline, "the machines outlived their worker"
            time.sleep(0.005)
        output, _ = run.communicate(timeout=60)
    assert "crashed while running" in output, output
    assert output.count("kept: vm-") == 2, output
    for entry in inventory(Store(no_vms)):
        assert not entry.live
        assert entry.record.retained is not None


def test_workers_end_with_their_controller_whatever_they_do(
    pytester: pytest.Pytester, no_vms: Path
) -> None:
    """Before execnet notices, which interrupts them after five seconds, and waits ten more."""
    marker, interrupted = pytester.path / "in-the-test", pytester.path / "interrupted"
    pytester.makepyfile(
        f"""
        import os, time
        from pathlib import Path

        def test_long(smolvm):
            Path("{marker}.new").write_text(str(os.getpid()))
            os.rename("{marker}.new", "{marker}")
            try:
                time.sleep(600)
            finally:
                Path("{interrupted}").touch()
        """
    )
    with start("-n1") as run:
        wait_for(marker.exists, run)
        (entry,) = inventory(Store(no_vms))
        ours = [
            ProcessIdentity.of(pid) for pid in (int(marker.read_text()), entry.record.machine_pid)
        ]
        assert None not in ours
        run.kill()
        deadline = time.monotonic() + 60
        while any(process and process.is_alive() for process in ours):
            assert time.monotonic() < deadline, "the worker and its machine outlived the run"
            time.sleep(0.005)
        run.communicate(timeout=60)
    assert not interrupted.exists()
    store = Store(no_vms)
    assert store.sweep() == [entry.record.vm_id]


def test_a_worker_ends_machines_that_are_past_answering_before_xdist_ends_it(
    pytester: pytest.Pytester, no_vms: Path
) -> None:
    marker = pytester.path / "stopped"
    pytester.makepyfile(
        f"""
        import os, pytest, signal, time
        from pathlib import Path

        @pytest.mark.smolvm(mem_size_mib=200)
        def test_long(smolvm, smolvm_factory):
            vms = [smolvm, smolvm_factory(), smolvm_factory()]
            for vm in vms:
                os.kill(vm._machine.pid, signal.SIGSTOP)
            Path("{marker}").touch()
            time.sleep(600)
        """
    )
    interrupt(start("-n1"), marker.exists)
    entries = inventory(Store(no_vms))
    # By the worker, that is: not by the controller, when the worker had been killed.
    assert reasons(entries) == ["the run was interrupted in it"] * 3
    assert not any(entry.live for entry in entries)


def reasons(entries: list[Entry]) -> list[str | None]:
    return [entry.record.retained and entry.record.retained.reason for entry in entries]


def test_ctrl_c_is_seen_by_all_workers_which_keep_what_they_were_at(
    pytester: pytest.Pytester, no_vms: Path
) -> None:
    marker = pytester.path / "started"
    pytester.makepyfile(
        f"""
        import pytest
        from pathlib import Path

        @pytest.mark.smolvm(mem_size_mib=256)
        @pytest.mark.parametrize("number", range(2))
        def test_long(smolvm, number):
            smolvm.run("echo canary > /root/canary")
            Path(f"{marker}-{{number}}").touch()
            smolvm.run("sleep 600", timeout=600)
        """
    )
    interrupt(start("-n2"), *(Path(f"{marker}-{number}").exists for number in range(2)))
    entries = inventory(Store(no_vms))
    # Ended by their workers, within the time that xdist gives them: had it killed
    # them, the reason would be that their owner died.
    assert reasons(entries) == ["the run was interrupted in it"] * 2
    assert cli("ssh", entries[0].vm_id, "cat /root/canary").stdout == "canary\n"
