"""Every option, in one table; its text for the command line, for ini files and for readers.

The nearest wins: marker (function, then class, then module), then command
line, then ini, then the default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pytest_smolvm.limits import (
    ACCELERATORS,
    ARCHITECTURES,
    BACKENDS,
    DEFAULT_IMAGE,
    DEFAULT_MEM_SIZE_MIB,
    DEFAULT_VCPU_COUNT,
    DISK_MODES,
    IMAGES,
    MEM_SIZE_MIB,
    NETWORKS,
    VCPU_COUNT,
)

SCOPES = ("function", "class", "module", "session")
POLICIES = ("all", "failed", "none")

# Ini files have known numbers since pytest 8.4; before that they are text.
_NUMBERS_KNOWN = pytest.version_tuple >= (8, 4)


@dataclass(frozen=True)
class Option:
    """One setting. ``name`` is what it is called in the marker and in ``VMConfig``."""

    name: str
    help: str
    default: str
    """What holds when it is not given, in words."""
    ini: str | None = None
    flag: str | None = None
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    ini_type: Any = "string"
    convert: Callable[[Any], Any] = str
    in_marker: bool = True
    is_config_field: bool = False
    """Whether it is a field of ``VMConfig``."""
    switch_off: bool = False
    """Whether the flag takes no value, and means False."""

    @property
    def destination(self) -> str:
        return f"smolvm_{self.name}"


def _number_within(lowest: float, highest: float, unit: str = "") -> Callable[[Any], int]:
    upper = " or more" if highest == float("inf") else f" to {highest:g}"
    problem = f"give a whole number, {lowest:g}{upper}{unit}"

    def convert(text: Any) -> int:
        try:
            number = int(str(text).strip())
        except ValueError:
            raise ValueError(problem) from None
        if not lowest <= number <= highest:
            raise ValueError(problem)
        return number

    return convert


def seconds(value: Any) -> float:
    """A number of seconds above 0; else ``ValueError``."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = 0.0
    if isinstance(value, bool) or not 0 < number < float("inf"):
        raise ValueError("give seconds, more than 0")
    return number


def _variables(lines: list[str]) -> dict[str, str]:
    variables = {}
    for line in lines:
        key, equals, value = line.partition("=")
        if not equals:
            raise ValueError(f"the line {line!r} is not of the form KEY=value")
        variables[key.strip()] = value
    return variables


def _number_type(name: str) -> Any:
    return name if _NUMBERS_KNOWN else "string"


_ANY = float("inf")

OPTIONS = (
    Option(
        "backend",
        "what runs the VMs",
        "auto",
        ini="smolvm_backend",
        flag="--smolvm-backend",
        choices=BACKENDS,
        is_config_field=True,
    ),
    Option(
        "accel",
        "what the backend runs guests with; auto: the quickest that really runs one",
        "auto",
        ini="smolvm_accel",
        flag="--smolvm-accel",
        choices=ACCELERATORS,
        in_marker=False,
    ),
    Option(
        "image",
        f"the image that VMs boot from: {', '.join(IMAGES)}, or one of the project's own",
        DEFAULT_IMAGE,
        ini="smolvm_image",
        flag="--smolvm-image",
        metavar="NAME",
    ),
    Option(
        "arch",
        "the processor that the image is for",
        "this host's",
        choices=ARCHITECTURES,
    ),
    Option(
        "kernel_path",
        "the kernel to boot, instead of the image's",
        "the image's",
        ini="smolvm_kernel_path",
        flag="--smolvm-kernel",
        metavar="PATH",
        convert=Path,
        is_config_field=True,
    ),
    Option(
        "rootfs_path",
        "the root disk to boot from, instead of the image's",
        "the image's",
        ini="smolvm_rootfs_path",
        flag="--smolvm-rootfs",
        metavar="PATH",
        convert=Path,
        is_config_field=True,
    ),
    Option(
        "initrd_path",
        "the initial RAM disk",
        "<kernel>.initrd, if there is one",
        ini="smolvm_initrd_path",
        flag="--smolvm-initrd",
        metavar="PATH",
        convert=Path,
        is_config_field=True,
    ),
    Option(
        "scope",
        "which tests share a VM, if they want the same one: those of a function (that is: "
        "none), a class, a module, the session",
        "function",
        ini="smolvm_scope",
        flag="--smolvm-scope",
        choices=SCOPES,
    ),
    Option(
        "retain",
        "whose VMs are kept to be looked at: of all tests, of failed ones, of none",
        "failed",
        ini="smolvm_retention_policy",
        flag="--smolvm-retain",
        choices=POLICIES,
    ),
    Option(
        "retention_count",
        "of how many sessions of this project VMs are kept",
        "3",
        ini="smolvm_retention_count",
        ini_type=_number_type("int"),
        convert=_number_within(0, _ANY),
        in_marker=False,
    ),
    Option(
        "retention_max_mib",
        "how much disk the kept VMs of this project may take, in MiB",
        "4096",
        ini="smolvm_retention_max_mib",
        ini_type=_number_type("int"),
        convert=_number_within(0, _ANY, " MiB"),
        in_marker=False,
    ),
    Option(
        "network",
        "whether guests may go out",
        "isolated",
        ini="smolvm_network",
        flag="--smolvm-network",
        choices=NETWORKS,
        is_config_field=True,
    ),
    Option(
        "restore",
        "whether a VM may start from a template, the saved state of one that was booted before",
        "true",
        ini="smolvm_restore",
        flag="--smolvm-no-restore",
        ini_type="bool",
        convert=bool,
        switch_off=True,
    ),
    Option(
        "prefetch",
        "how many VMs are made ready ahead of their tests, while another runs",
        "1",
        ini="smolvm_prefetch",
        flag="--smolvm-prefetch",
        metavar="N",
        ini_type=_number_type("int"),
        convert=_number_within(0, 64),
        in_marker=False,
    ),
    Option(
        "boot_timeout",
        "seconds that a VM may take until it lets us in",
        "60; 180 where guests are emulated",
        ini="smolvm_boot_timeout",
        flag="--smolvm-boot-timeout",
        metavar="S",
        ini_type=_number_type("float"),
        convert=seconds,
    ),
    Option(
        "state_dir",
        "where images, keys and the VMs' files lie",
        "$SMOLVM_STATE_DIR, or where the platform keeps state",
        ini="smolvm_state_dir",
        flag="--smolvm-state-dir",
        metavar="DIR",
        convert=Path,
        in_marker=False,
    ),
    Option(
        "vcpu_count",
        f"virtual CPUs per VM, {VCPU_COUNT[0]} to {VCPU_COUNT[1]}",
        str(DEFAULT_VCPU_COUNT),
        ini="smolvm_vcpu_count",
        ini_type=_number_type("int"),
        convert=_number_within(*VCPU_COUNT),
        is_config_field=True,
    ),
    Option(
        "mem_size_mib",
        f"memory per VM in MiB, {MEM_SIZE_MIB[0]} to {MEM_SIZE_MIB[1]}",
        str(DEFAULT_MEM_SIZE_MIB),
        ini="smolvm_mem_size_mib",
        ini_type=_number_type("int"),
        convert=_number_within(*MEM_SIZE_MIB, " MiB"),
        is_config_field=True,
    ),
    Option(
        "boot_args",
        "kernel boot arguments",
        "SSH_BOOT_ARGS",
        ini="smolvm_boot_args",
        is_config_field=True,
    ),
    Option(
        "disk_mode",
        "isolated: a disk per VM; shared: the image itself, read-only",
        "isolated",
        ini="smolvm_disk_mode",
        choices=DISK_MODES,
        is_config_field=True,
    ),
    Option(
        "env_vars",
        "environment variables for the guests, one KEY=value per line",
        "none",
        ini="smolvm_env_vars",
        ini_type="linelist",
        convert=_variables,
        is_config_field=True,
    ),
    Option(
        "vm_id",
        "the VM's id, unique on this host",
        "vm- and 8 hexadecimal digits",
        is_config_field=True,
    ),
    Option(
        "retain_disk_on_delete",
        "whether the disk stays, whatever the policy, for a later VM of that vm_id",
        "false",
        is_config_field=True,
    ),
    Option(
        "prepare",
        "a function of the VM, or a list of commands, whose work is done in a VM before a test "
        "gets it; it is done once, and later VMs start from there",
        "nothing",
    ),
    Option(
        "prepare_key",
        "a text that stands for what prepare does: when it changes, that is done anew",
        "made of the function's source and of the values that it uses",
    ),
)

MARKER_ARGUMENTS = tuple(sorted(option.name for option in OPTIONS if option.in_marker))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("smolvm", "virtual machines (pytest-smolvm)")
    for option in OPTIONS:
        help_text = f"{option.help} (default: {option.default})".replace("%", "%%")
        if option.flag and option.switch_off:
            group.addoption(
                option.flag,
                dest=option.destination,
                default=None,
                action="store_const",
                const=False,
                help="boot every VM; do not restore any from a template",
            )
        elif option.flag:
            group.addoption(
                option.flag,
                dest=option.destination,
                default=None,
                metavar=option.metavar,
                choices=option.choices,
                help=help_text,
            )
        if option.ini:
            parser.addini(option.ini, help_text, type=option.ini_type, default=None)
