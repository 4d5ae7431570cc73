"""Options: command line, ini and marker, and the one rule by which they meet.

The nearest wins: marker (function, then class, then module), then command
line, then ini, then the default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BACKENDS = ("auto", "qemu", "firecracker")
NETWORKS = ("isolated", "nat")
DISK_MODES = ("isolated", "shared")

MARKER_LINE = (
    "smolvm(**kwargs): change the VM that the test gets: any field of VMConfig "
    "(vcpu_count, mem_size_mib, env_vars, ...), image, boot_timeout"
)

MARKER_ONLY = ("image", "boot_timeout")
"""What the marker takes beside the fields of ``VMConfig``."""


@dataclass(frozen=True)
class Option:
    """One setting. ``field`` is the name it has in the marker and in ``VMConfig``."""

    field: str
    ini: str
    help: str
    flag: str | None = None
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    ini_type: Any = "string"
    convert: Callable[[Any], Any] = str


def _whole_number(text: Any) -> int:
    return int(str(text).strip())


def _variables(lines: list[str]) -> dict[str, str]:
    variables = {}
    for line in lines:
        key, equals, value = line.partition("=")
        if not equals:
            raise ValueError(f"the line {line!r} is not of the form KEY=value")
        variables[key.strip()] = value
    return variables


OPTIONS = (
    Option(
        "backend",
        "smolvm_backend",
        "what runs the VMs (default: auto)",
        flag="--smolvm-backend",
        choices=BACKENDS,
    ),
    Option(
        "image",
        "smolvm_image",
        "the image that VMs boot from (default: micro)",
        flag="--smolvm-image",
        metavar="NAME",
    ),
    Option(
        "kernel_path",
        "smolvm_kernel_path",
        "the kernel to boot, instead of the image's",
        flag="--smolvm-kernel",
        metavar="PATH",
        convert=Path,
    ),
    Option(
        "rootfs_path",
        "smolvm_rootfs_path",
        "the root disk to boot from, instead of the image's",
        flag="--smolvm-rootfs",
        metavar="PATH",
        convert=Path,
    ),
    Option(
        "initrd_path",
        "smolvm_initrd_path",
        "the initial RAM disk (default: <kernel>.initrd, if there is one)",
        flag="--smolvm-initrd",
        metavar="PATH",
        convert=Path,
    ),
    Option(
        "network",
        "smolvm_network",
        "whether guests may go out (default: isolated)",
        flag="--smolvm-network",
        choices=NETWORKS,
    ),
    Option("vcpu_count", "smolvm_vcpu_count", "virtual CPUs per VM", convert=_whole_number),
    Option("mem_size_mib", "smolvm_mem_size_mib", "memory per VM, in MiB", convert=_whole_number),
    Option("boot_args", "smolvm_boot_args", "kernel boot arguments (default: SSH_BOOT_ARGS)"),
    Option(
        "disk_mode",
        "smolvm_disk_mode",
        "isolated: a disk per VM; shared: the image itself, read-only (default: isolated)",
        choices=DISK_MODES,
    ),
    Option(
        "env_vars",
        "smolvm_env_vars",
        "environment variables for the guests, one KEY=value per line",
        ini_type="linelist",
        convert=_variables,
    ),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("smolvm", "virtual machines (pytest-smolvm)")
    for option in OPTIONS:
        if option.flag:
            group.addoption(
                option.flag,
                dest=_destination(option),
                default=None,
                metavar=option.metavar,
                choices=option.choices,
                help=option.help,
            )
        parser.addini(option.ini, option.help, type=option.ini_type, default=None)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER_LINE)
    settings(config)


def settings(config: pytest.Config) -> dict[str, Any]:
    """What command line and ini say: only what was given, by field name.

    Raises ``pytest.UsageError`` for a value that cannot be right.
    """
    found: dict[str, Any] = {}
    for option in OPTIONS:
        source, value = _given(config, option)
        if value is None:
            continue
        if option.choices and value not in option.choices:
            raise pytest.UsageError(
                f"{source} = {value!r} is not valid: use one of {', '.join(option.choices)}"
            )
        try:
            found[option.field] = option.convert(value)
        except ValueError as error:
            raise pytest.UsageError(f"{source} = {value!r} is not valid: {error}") from None
    return found


def _given(config: pytest.Config, option: Option) -> tuple[str, Any]:
    if option.flag:
        value = config.getoption(_destination(option), None)
        if value is not None:
            path = _path_from(config.invocation_params.dir, value, option)
            return option.flag, path
    value = config.getini(option.ini)
    if value in (None, "", []):
        return option.ini, None
    base = config.inipath.parent if config.inipath else config.rootpath
    return f"the ini option {option.ini}", _path_from(base, value, option)


def _path_from(base: Path, value: Any, option: Option) -> Any:
    # A path on the command line is relative to where pytest was started, one in
    # an ini file to that file.
    return base / Path(value).expanduser() if option.convert is Path else value


def _destination(option: Option) -> str:
    return f"smolvm_{option.field}"


def marker_arguments(item: pytest.Item, valid: set[str]) -> tuple[dict[str, Any], str]:
    """The ``smolvm`` markers of an item, merged key by key, the nearest winning.

    The second value says what is wrong with them; it is empty when nothing is.
    """
    merged: dict[str, Any] = {}
    for marker in item.iter_markers("smolvm"):
        if marker.args:
            return {}, f"@pytest.mark.smolvm takes keyword arguments only, not {marker.args!r}"
        for key, value in marker.kwargs.items():
            if key not in valid:
                return {}, (
                    f"@pytest.mark.smolvm has no argument {key!r}: the valid ones are "
                    f"{', '.join(sorted(valid))}"
                )
            merged.setdefault(key, value)
    return merged, ""
