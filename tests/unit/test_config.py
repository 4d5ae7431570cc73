"""VMConfig: every field, default, range and rule."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pytest_smolvm import SSH_BOOT_ARGS, VMConfig

Files = dict[str, Path]


def refused(files: Files, **fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        VMConfig(**{**files, **fields})
    return str(caught.value)


def test_the_defaults_are_the_references(plain_files: Files) -> None:
    config = VMConfig(**plain_files)
    assert re.fullmatch(r"vm-[0-9a-f]{8}", config.vm_id)
    assert config.vcpu_count == 2
    assert config.mem_size_mib == 512
    assert config.kernel_path == plain_files["kernel_path"]
    assert config.rootfs_path == plain_files["rootfs_path"]
    assert config.boot_args == "console=ttyS0 reboot=k panic=1 pci=off"
    assert config.backend is None
    assert config.disk_mode == "isolated"
    assert config.retain_disk_on_delete is False
    assert config.env_vars == {}
    assert config.initrd_path is None
    assert config.network == "isolated"


def test_the_boot_arguments_for_ssh_are_the_interfaces() -> None:
    assert SSH_BOOT_ARGS == ("console=ttyS0 reboot=k panic=1 pci=off root=/dev/vda rw init=/init")


def test_an_id_of_none_is_generated_anew_each_time(plain_files: Files) -> None:
    ids = {VMConfig(vm_id=None, **plain_files).vm_id for _ in range(50)}
    assert len(ids) == 50
    assert all(re.fullmatch(r"vm-[0-9a-f]{8}", vm_id) for vm_id in ids)


@pytest.mark.parametrize("vm_id", ["a", "0", "my-vm", "a--b", "a" * 64, "1-2-3"])
def test_valid_ids_are_taken_as_they_are(plain_files: Files, vm_id: str) -> None:
    assert VMConfig(vm_id=vm_id, **plain_files).vm_id == vm_id


@pytest.mark.parametrize(
    "vm_id", ["", "-a", "a-", "A", "a_b", "a.b", "a b", "a" * 65, "ü", "a\n", "../a", "a/b"]
)
def test_invalid_ids_are_named_in_an_error_that_shows_a_valid_one(
    plain_files: Files, vm_id: str
) -> None:
    text = refused(plain_files, vm_id=vm_id)
    assert repr(vm_id) in text
    assert "lowercase letters, digits and hyphens" in text
    assert "web-server-1" in text


@pytest.mark.parametrize("field", ["kernel_path", "rootfs_path"])
def test_kernel_and_root_disk_are_required(plain_files: Files, field: str) -> None:
    del plain_files[field]
    text = refused(plain_files)
    assert field in text
    assert "Field required" in text


@pytest.mark.parametrize(
    ("field", "lowest", "highest"), [("vcpu_count", 1, 32), ("mem_size_mib", 128, 16384)]
)
def test_numbers_are_held_within_their_range(
    plain_files: Files, field: str, lowest: int, highest: int
) -> None:
    for value in (lowest, highest):
        assert getattr(VMConfig(**{**plain_files, field: value}), field) == value
    for value, bound in ((lowest - 1, lowest), (highest + 1, highest)):
        text = refused(plain_files, **{field: value})
        assert field in text
        assert str(value) in text
        assert str(bound) in text


@pytest.mark.parametrize("value", ["many", 1.5, None, True])
def test_what_is_no_whole_number_is_no_count(plain_files: Files, value: Any) -> None:
    assert "vcpu_count" in refused(plain_files, vcpu_count=value)


@pytest.mark.parametrize("field", ["kernel_path", "rootfs_path", "initrd_path"])
def test_a_path_must_name_a_file_that_is_there(
    plain_files: Files, tmp_path: Path, field: str
) -> None:
    missing = tmp_path / "missing"
    text = refused(plain_files, **{field: missing})
    assert str(missing) in text
    assert "does not exist" in text
    text = refused(plain_files, **{field: tmp_path})
    assert str(tmp_path) in text
    assert "is a directory" in text


def test_a_loop_of_links_and_a_device_are_no_files(plain_files: Files, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert str(loop) in refused(plain_files, kernel_path=loop)
    assert "not a regular file" in refused(plain_files, rootfs_path="/dev/null")
    assert "kernel_path" in refused(plain_files, kernel_path="with\0nul")


def test_paths_may_be_given_as_text(plain_files: Files) -> None:
    config = VMConfig(**{key: str(path) for key, path in plain_files.items()})
    assert config.kernel_path == plain_files["kernel_path"]


@pytest.mark.parametrize("backend", [None, "auto", "qemu", "firecracker"])
def test_the_backends_of_the_reference_are_taken(plain_files: Files, backend: str | None) -> None:
    assert VMConfig(backend=backend, **plain_files).backend == backend


@pytest.mark.parametrize(
    ("field", "value", "valid"),
    [
        ("backend", "xen", "'auto', 'qemu' or 'firecracker'"),
        ("disk_mode", "private", "'isolated' or 'shared'"),
        ("network", "bridge", "'isolated' or 'nat'"),
    ],
)
def test_a_wrong_choice_is_answered_with_the_right_ones(
    plain_files: Files, field: str, value: str, valid: str
) -> None:
    text = refused(plain_files, **{field: value})
    assert valid in text
    assert repr(value) in text


@pytest.mark.parametrize("key", ["A", "_", "a1", "LOG_LEVEL", "_1"])
def test_shell_identifiers_are_taken_as_variable_names(plain_files: Files, key: str) -> None:
    assert VMConfig(env_vars={key: "x"}, **plain_files).env_vars == {key: "x"}


@pytest.mark.parametrize("key", ["", "1A", "A-B", "A B", "A=B", "Ä", "A\n"])
def test_other_variable_names_are_named_in_the_error(plain_files: Files, key: str) -> None:
    text = refused(plain_files, env_vars={key: "x"})
    assert repr(key) in text
    assert "letters, digits and underscores" in text


@pytest.mark.parametrize("value", ["a\0b", "\ud800"])
def test_values_that_no_environment_holds_are_refused(plain_files: Files, value: str) -> None:
    assert "'KEY'" in refused(plain_files, env_vars={"KEY": value})


def test_variable_values_must_be_text(plain_files: Files) -> None:
    assert "valid string" in refused(plain_files, env_vars={"KEY": 1})


def test_an_unknown_field_is_refused(plain_files: Files) -> None:
    text = refused(plain_files, memory=256)
    assert "memory" in text
    assert "not permitted" in text


def test_a_configuration_is_frozen(plain_files: Files) -> None:
    config = VMConfig(**plain_files)
    with pytest.raises(ValidationError, match="frozen"):
        config.vcpu_count = 4  # type: ignore[misc]
    changed = config.model_copy(update={"vcpu_count": 4})
    assert (config.vcpu_count, changed.vcpu_count) == (2, 4)
    assert changed.vm_id == config.vm_id


def test_a_configuration_does_not_change_with_the_dict_it_was_made_from(
    plain_files: Files,
) -> None:
    variables = {"A": "1"}
    config = VMConfig(env_vars=variables, **plain_files)
    variables["A"] = "2"
    assert config.env_vars == {"A": "1"}


def test_a_configuration_survives_the_way_through_json(plain_files: Files) -> None:
    config = VMConfig(env_vars={"A": "ü\n"}, **plain_files)
    assert VMConfig.model_validate_json(config.model_dump_json()) == config


def test_the_initrd_beside_the_kernel_is_used_if_it_is_there(plain_files: Files) -> None:
    assert VMConfig(**plain_files).effective_initrd_path() is None
    beside = plain_files["kernel_path"].with_name("vmlinux.initrd")
    beside.write_bytes(b"initrd")
    assert VMConfig(**plain_files).effective_initrd_path() == beside
    given = beside.with_name("other")
    given.write_bytes(b"other")
    assert VMConfig(initrd_path=given, **plain_files).effective_initrd_path() == given


def test_ssh_is_offered_by_the_boot_arguments_alone(plain_files: Files) -> None:
    assert not VMConfig(**plain_files).offers_ssh
    assert not VMConfig(boot_args="init=/init2", **plain_files).offers_ssh
    assert VMConfig(boot_args=SSH_BOOT_ARGS, **plain_files).offers_ssh
