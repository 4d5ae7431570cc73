"""Kernels: what goes on the command line of one, and which Firecracker boots."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path


def kernel_command_line(
    boot_args: str,
    *,
    console: str,
    read_only: bool,
    replaced: Mapping[str, str | None],
) -> str:
    """The words of ``VMConfig.boot_args``, as a machine takes them.

    * A serial console is the one that the machine has (``console``), and is there even if nobody
      asked: errors quote it.
    * A word that ``replaced`` knows becomes another, or (None) goes.
    * ``root=/dev/vda``, ``panic=1`` and ``rw`` are added where nothing is said about root, panic,
      and reading or writing; a read-only disk means ``ro``.
    """
    words = []
    for word in boot_args.split():
        settled: str | None = replaced.get(word, word)
        if settled is None:
            continue
        serial = re.fullmatch(r"console=(?:ttyS|ttyAMA)\d+(,.*)?", settled)
        if serial:
            settled = f"console={console}{serial.group(1) or ''}"
        elif settled in ("rw", "ro") and read_only:
            settled = "ro"
        words.append(settled)

    def says(*prefixes: str) -> bool:
        return any(word.startswith(prefixes) for word in words)

    if not says(f"console={console}"):
        words.insert(0, f"console={console}")
    if not says("root="):
        words.append("root=/dev/vda")
    if not {"rw", "ro"} & set(words):
        words.append("ro" if read_only else "rw")
    if not says("panic="):
        words.append("panic=1")
    return " ".join(words)


def with_host_name(command_line: str, name: str) -> str:
    """The command line that names the guest, if nothing else on it does.

    Linux from 5.19 on takes it; before that, it is one more variable for init.
    """
    if re.search(r"(^|\s)hostname=", command_line):
        return command_line
    return f"{command_line} hostname={name}"


def firecracker_problem(kernel: Path, architecture: str) -> str:
    """Why Firecracker cannot boot that kernel, with what would be right; empty: it can."""
    try:
        with kernel.open("rb") as file:
            head = file.read(0x40)
    except OSError as error:
        return f"the kernel {kernel} cannot be read: {error.strerror}"
    kinds = {"x86_64": head[:4] == b"\x7fELF", "aarch64": head[0x38:0x3C] == b"ARM\x64"}
    if kinds[architecture]:
        return ""
    return (
        f"{kernel} is not a kernel that Firecracker can boot on {architecture}: it starts with "
        f"{head[:8].hex() or 'nothing'}; give an uncompressed ELF vmlinux (x86), or an Image "
        "(arm64). The images that ImageBuilder makes have one"
    )
