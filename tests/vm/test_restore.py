"""VMs that start from a template: when they do, and that nobody can tell them from others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_smolvm import BackendError, SmolVM, VMConfig, waking
from pytest_smolvm.startup import _failures
from pytest_smolvm.templates import _checked
from tests.conftest import changed

CANARY = "canary-3f9d2a71c5"


def templates_in(state: Path) -> list[Path]:
    return sorted(path.parent for path in (state / "templates").glob("[!.]*/template.json"))


@pytest.fixture
def template(as_in_a_new_process: None, no_templates: Path, micro_config: VMConfig) -> Path:
    """The directory of the one template in a state directory, fresh from its maker."""
    with SmolVM(micro_config) as vm:
        assert not vm.restored
        assert vm.templates_made == 1
        assert vm.run("true").ok
        assert set(vm.timings) == {"disk", "launch", "boot", "ssh", "template"}
    (path,) = templates_in(no_templates)
    return path


@pytest.fixture(autouse=True)
def as_in_a_new_process() -> Iterator[None]:
    """What this process has found out about templates, in other tests too, is forgotten."""
    _checked.clear()
    _failures.clear()
    yield
    _checked.clear()
    _failures.clear()


@pytest.fixture
def restored(micro_config: VMConfig) -> Iterator[SmolVM]:
    """A VM that started from a template, whoever made that."""
    SmolVM(micro_config).start().delete()
    with SmolVM(changed(micro_config, vm_id="restored", env_vars={"MODE": "test"})) as vm:
        assert vm.restored
        yield vm


def another(config: VMConfig, **fields: object) -> SmolVM:
    """A VM of the same configuration, but for an id of its own."""
    fresh = VMConfig(**{**config.model_dump(exclude={"vm_id"}), **fields})
    return SmolVM(fresh)


# -- when -----------------------------------------------------------------------


def test_later_vms_are_restored_from_what_the_first_has_left(
    template: Path, micro_config: VMConfig
) -> None:
    with another(micro_config) as vm:
        assert vm.restored
        assert vm.templates_made == 0
        assert set(vm.timings) == {"disk", "launch", "restore", "ssh"}
        assert vm.run("true").ok


def test_a_restore_is_quicker_than_a_boot(template: Path, micro_config: VMConfig) -> None:
    with another(micro_config) as restored:
        pass
    booted = SmolVM(changed(micro_config, vm_id="booted"), restore=False)
    with booted:
        assert not booted.restored
    assert sum(restored.timings.values()) < sum(booted.timings.values())


def test_an_image_is_known_by_its_content_wherever_it_lies(
    template: Path, micro_config: VMConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(micro_config.rootfs_path.parent, folder)
    moved = {
        "kernel_path": folder / micro_config.kernel_path.name,
        "rootfs_path": folder / micro_config.rootfs_path.name,
    }
    with another(micro_config, **moved) as vm:
        assert vm.restored
    with moved["rootfs_path"].open("r+b") as image:
        image.seek(-1, os.SEEK_END)
        image.write(b"x")
    with another(micro_config, **moved) as vm:
        assert not vm.restored


@pytest.mark.parametrize(
    "fields", [{"mem_size_mib": 192}, {"vcpu_count": 1}, {"boot_args_end": " quiet"}]
)
def test_another_machine_has_a_template_of_its_own(
    template: Path, micro_config: VMConfig, fields: dict[str, object]
) -> None:
    if end := fields.pop("boot_args_end", ""):
        fields["boot_args"] = micro_config.boot_args + str(end)
    with another(micro_config, **fields) as vm:
        assert not vm.restored
    with another(micro_config, **fields) as vm:
        assert vm.restored
    assert len(templates_in(template.parents[1])) == 2


def test_whoever_does_not_want_it_boots_and_leaves_nothing(
    no_templates: Path, micro_config: VMConfig
) -> None:
    with SmolVM(micro_config, restore=False) as vm:
        assert not vm.restored
        assert vm.run("hostname").output == micro_config.vm_id
    assert templates_in(no_templates) == []


def test_a_shared_disk_and_a_disk_that_goes_on_boot_without_fuss(
    template: Path, micro_config: VMConfig
) -> None:
    with another(micro_config, disk_mode="shared") as vm:
        assert not vm.restored
        assert vm.troubles == []
    fields = {"vm_id": "goes-on", "retain_disk_on_delete": True}
    with another(micro_config, **fields) as vm:
        assert vm.restored
        vm.run("echo kept > /root/kept", check=True)
    with another(micro_config, **{**fields, "retain_disk_on_delete": False}) as vm:
        assert not vm.restored
        assert vm.troubles == []
        assert vm.read_text("/root/kept") == "kept\n"


def test_a_kept_disk_outlives_the_template_that_it_began_with(
    template: Path, micro_config: VMConfig
) -> None:
    with another(micro_config, vm_id="kept", retain_disk_on_delete=True) as vm:
        vm.run("echo kept > /root/kept", check=True)
    shutil.rmtree(template)
    vm = SmolVM.from_id("kept").start()
    assert vm.read_text("/root/kept") == "kept\n"
    vm.delete()


def test_processes_that_want_it_at_once_make_it_once(
    no_templates: Path, micro_config: VMConfig
) -> None:
    script = f"""
from pytest_smolvm import BackendError, SmolVM, VMConfig, waking
config = VMConfig.model_validate_json({micro_config.model_dump_json(exclude={"vm_id"})!r})
with SmolVM(config) as vm:
    assert vm.run("true").ok
    print(vm.restored, vm.templates_made, vm.troubles)
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    told = sorted(run.communicate(timeout=300)[0].strip() for run in runs)
    assert told == ["False 1 []", "True 0 []", "True 0 []"]


# -- when something is wrong ------------------------------------------------------


@pytest.mark.parametrize(
    "damage", ["truncated memory", "a bit of memory", "state", "facts", "disk"]
)
def test_a_damaged_template_is_told_of_and_made_anew(
    template: Path, micro_config: VMConfig, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    if damage == "truncated memory":
        os.truncate(template / "memory", 4096)
    elif damage == "a bit of memory":
        with (template / "memory").open("r+b") as file:
            file.seek(1 << 20)
            file.seek(-1, os.SEEK_CUR)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 4]))
    elif damage == "state":
        (template / "state").write_bytes((template / "state").read_bytes()[:-1000])
    elif damage == "facts":
        (template / "template.json").write_text("{")
    else:
        next(template.glob("layer-*")).unlink()
    _checked.clear()  # as in another process
    with another(micro_config) as vm:
        assert not vm.restored
        assert vm.templates_made == 1
        assert len(vm.troubles) == 1
        assert "a template could not be used, and is made anew" in vm.troubles[0]
        assert vm.run("true").ok
    assert "made anew" in caplog.text
    with another(micro_config) as vm:
        assert vm.restored
        assert vm.troubles == []


def test_a_state_that_qemu_cannot_load_is_no_trouble_of_the_vm(
    template: Path, micro_config: VMConfig
) -> None:
    state = template / "state"
    data = bytearray(state.read_bytes())
    data[:64] = bytes(64)
    state.write_bytes(data)
    # Its checksum is not looked at again in the process that made it.
    with another(micro_config) as vm:
        assert not vm.restored
        assert "QEMU could not load a saved state" in vm.troubles[0]
        assert vm.run("true").ok


def test_a_guest_that_does_not_wake_is_no_trouble_of_the_vm(
    template: Path, micro_config: VMConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = waking.wake
    calls: list[object] = []

    def fails_once(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise BackendError("the guest's agent does not answer")
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(waking, "wake", fails_once)
    with another(micro_config) as vm:
        assert not vm.restored
        assert "the guest's agent does not answer" in vm.troubles[0]
        vm.run("echo file > /root/file; sync", check=True)
        # Its disk lies over the image itself, and not over what the template had between.
        vm.stop().start()
        assert vm.read_text("/root/file") == "file\n"
        assert vm._machine is not None
        assert not any("layer-" in word for word in vm._machine.command_line)
    with another(micro_config) as vm:
        assert vm.restored


def test_a_template_that_cannot_be_made_leaves_a_vm_that_works(
    no_templates: Path, micro_config: VMConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pytest_smolvm.snapshots.copy_sparsely", no_space)
    with SmolVM(changed(micro_config, env_vars={"A": "1"})) as vm:
        assert "No space left" in vm.troubles[0]
        assert vm.run("echo $A").output == "1"
    assert [path.name for path in (no_templates / "templates").glob("[!.]*[!k]")] == []
    assert list((no_templates / "templates").glob(".*")) == []


def test_an_image_without_an_agent_boots_without_fuss(
    no_templates: Path, micro_config: VMConfig, tmp_path: Path
) -> None:
    from pytest_smolvm.images.manifest import read_manifest, write_manifest

    rootfs = tmp_path / "rootfs.ext4"
    shutil.copy(micro_config.rootfs_path, rootfs)
    manifest = read_manifest(micro_config.rootfs_path)
    assert manifest is not None
    write_manifest(rootfs, manifest.model_copy(update={"agent": ""}))
    with another(micro_config, rootfs_path=rootfs) as vm:
        assert (vm.restored, vm.templates_made, vm.troubles) == (False, 0, [])


# -- a new machine ------------------------------------------------------------------


def test_the_clock_is_right_before_the_first_command(
    template: Path, micro_config: VMConfig
) -> None:
    for _ in range(3):
        with another(micro_config) as vm:
            # Nothing corrects a clock that was wrong; and a guest that has done a thing
            # before does it soon, so that we know when it looked.
            vm.run("adjtimex")
            before = time.time()
            told = vm.run("adjtimex", shell="raw").stdout
            after = time.time()
            seconds, micros = (
                int(line.split(":")[1].split()[0])
                for line in told.splitlines()
                if "tv_sec" in line or "tv_usec" in line
            )
            guest = seconds + micros / 1e6
            assert before - 0.05 <= guest <= after + 0.05, (before, guest, after)


def test_no_two_guests_are_alike(template: Path, micro_config: VMConfig) -> None:
    seen: dict[str, set[str]] = {}
    for _ in range(3):
        with another(micro_config) as vm:
            facts = {
                "random": "head -c 32 /dev/urandom | hexdump -e '\"%x\"'",
                "getrandom": "cat /proc/sys/kernel/random/uuid",
                "machine-id": "cat /etc/machine-id",
                "boot_id": "cat /proc/sys/kernel/random/boot_id",
                "host name": "hostname",
            }
            for name, command in facts.items():
                seen.setdefault(name, set()).add(vm.run(command, check=True).output)
            assert vm.run("hostname").output == vm.vm_id
            assert len(vm.run("cat /etc/machine-id").output) == 32
    assert {name: len(values) for name, values in seen.items()} == dict.fromkeys(seen, 3)


def test_what_is_its_own_stays_over_a_reboot(restored: SmolVM) -> None:
    facts = "hostname; cat /etc/machine-id; echo $MODE"
    before = restored.run(facts).stdout
    assert before.split()[::2] == ["restored", "test"]
    boot_id = restored.read_text("/proc/sys/kernel/random/boot_id")
    restored.run("echo file > /root/file; sync")
    restored.reboot()
    assert restored.run(facts).stdout == before
    assert restored.read_text("/root/file") == "file\n"
    assert restored.read_text("/proc/sys/kernel/random/boot_id") != boot_id


def test_environment_variables_are_each_vms_own(restored: SmolVM, micro_config: VMConfig) -> None:
    assert restored.run("echo $MODE").output == "test"
    assert restored.list_env_vars() == {"MODE": "test"}
    with another(micro_config) as other:
        assert other.run("echo [$MODE]").output == "[]"
        assert other.list_env_vars() == {}


def test_the_console_tells_of_the_boot_though_another_vm_booted(restored: SmolVM) -> None:
    restored.run("echo restored-guest > /dev/console")
    assert "Linux version" in restored.console
    assert "restored-guest" in restored.console


def test_it_can_be_stopped_started_paused_and_killed_like_any_other(restored: SmolVM) -> None:
    restored.run("echo file > /root/file; sync")
    restored.pause().resume()
    assert restored.run("true").ok
    restored.close()
    assert restored.run("true").ok
    restored.stop().start()
    assert not restored.restored
    assert restored.read_text("/root/file") == "file\n"


def test_many_commands_at_once_find_the_guest(restored: SmolVM) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(lambda n: restored.run(f"sleep 0.5; echo {n}"), range(6)))
    assert [result.output for result in results] == [str(n) for n in range(6)]


def test_nothing_of_one_test_reaches_the_next(template: Path, micro_config: VMConfig) -> None:
    """A canary in page cache, tmpfs, a process, the environment and free memory."""
    hide = f"""
for number in 1 2 3 4 5 6 7 8; do echo {CANARY}-file-$number; done > /root/canary
cp /root/canary /run/canary; cp /root/canary /dev/shm/canary; cp /root/canary /tmp/canary
cat /root/canary > /dev/null
(CANARY_ENV={CANARY}-env exec sh -c 'sleep 1000; : {CANARY}-process') > /dev/null 2>&1 &
dd if=/dev/zero bs=1024 count=2048 2> /dev/null | tr '\\0' x > /run/fill
for number in 1 2 3 4 5 6 7 8 9; do echo {CANARY}-freed; done > /run/freed; rm /run/freed /run/fill
"""
    # The pattern does not hold itself, nor does the command that looks for it.
    pattern = CANARY.replace("canary", "[c]anary")
    look = f"""
grep -rl '{pattern}' /root /run /tmp /dev/shm /etc 2> /dev/null
grep -l '{pattern}' /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2> /dev/null
true
"""
    with another(micro_config, env_vars={"SECRET": CANARY}) as first:
        first.run(hide, check=True)
        found = first.run(look).stdout
        for place in ("/root/canary", "/run/canary", "/dev/shm", "/tmp", "environ", "profile.d"):
            assert place in found, found
        assert in_memory(first) > 0
    with another(micro_config) as second:
        assert second.restored
        assert second.run(look).stdout == ""
        assert in_memory(second) == 0
    # Neither did it reach what all of them start from.
    for path in template.iterdir():
        assert CANARY.encode() not in path.read_bytes(), path


def in_memory(vm: SmolVM) -> int:
    """How often the canary stands anywhere in the guest's memory, free pages included."""
    assert vm._machine is not None
    monitor = vm._machine._monitor  # type: ignore[attr-defined]
    dump = vm.directory / "memory.dump"
    dump.touch()
    size = vm.config.mem_size_mib << 20
    monitor.execute("pmemsave", {"val": 0, "size": size, "filename": str(dump)})
    count = dump.read_bytes().count(CANARY.encode())
    dump.unlink()
    return count
