"""QEMU's command line and the kernel's, made in pure functions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pytest_smolvm.backends import kernel_args, nat
from pytest_smolvm.backends.base import PORT_NAME, MachineSpec
from pytest_smolvm.disks import Disk, Image
from pytest_smolvm.usernet import GUEST_ADDRESS, NETWORK

# spawn=deny: a QEMU taken over by its guest cannot start programs.
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True)
class Architecture:
    """What differs between the guests of one QEMU binary and another's."""

    name: str
    binary: str
    package: str
    machine: str
    cpu_emulated: str
    console: str
    memory_name: str
    """What QEMU calls the machine's memory in a saved state."""


ARCHITECTURES = {
    "x86_64": Architecture(
        name="x86_64",
        binary="qemu-system-x86_64",
        package="qemu-system-x86",
        # Everything that a guest would only spend time on looking for is off:
        # the PS/2 probe alone costs half a second under emulation.
        machine="q35,i8042=off,sata=off,smbus=off,usb=off,vmport=off,smm=off",
        cpu_emulated="max",
        console="ttyS0",
        memory_name="pc.ram",
    ),
    "aarch64": Architecture(
        name="aarch64",
        binary="qemu-system-aarch64",
        package="qemu-system-arm",
        machine="virt,gic-version=max",
        cpu_emulated="max",
        console="ttyAMA0",
        memory_name="mach-virt.ram",
    ),
}


def qemu_argv(
    spec: MachineSpec,
    architecture: Architecture,
    *,
    binary: str,
    monitor_fd: int,
    port_fd: int,
    console_fd: int,
) -> list[str]:
    """The whole command line.

    The monitor speaks QMP on the open socket ``monitor_fd``; the guest's port leads to
    ``port_fd``, its console to ``console_fd``.
    """
    command_line = kernel_command_line(spec.boot_args, architecture, spec.disk.read_only)
    command_line = kernel_args.with_host_name(command_line, spec.vm_id)
    accelerator = spec.accelerator
    if accelerator == "tcg" and spec.vcpu_count > 1:
        # With a thread per virtual CPU, QEMU 7.2 lets one CPU run code that
        # another has just patched: Linux died of "Oops: int3" in its jump
        # labels in 2 of 100 boots with 2 CPUs, and in none of 250 this way.
        accelerator = "tcg,thread=single"
    cpu = "host" if spec.accelerator in ("kvm", "hvf") else architecture.cpu_emulated
    user_network = _key_values(
        "user",
        id="net0",
        net=NETWORK,
        dhcpstart=GUEST_ADDRESS,
        ipv6="off",
        restrict="on" if spec.network == "isolated" else "off",
        # Port 0: the kernel picks a free one, and nobody can take it in between.
        hostfwd=f"tcp:{listening_address(spec)}:0-{GUEST_ADDRESS}:22",
    )
    return [
        binary,
        *("-name", f"smolvm-{spec.vm_id}"),
        "-nodefaults",
        "-no-user-config",
        *("-display", "none"),
        *("-machine", _machine(spec, architecture)),
        *_memory_arguments(spec, architecture),
        *("-accel", accelerator),
        *("-cpu", cpu),
        *("-smp", str(spec.vcpu_count)),
        *("-m", f"{spec.mem_size_mib}M"),
        *("-sandbox", _SANDBOX),
        *("-chardev", f"socket,id=monitor,fd={monitor_fd}"),
        *("-mon", "chardev=monitor,mode=control"),
        *("-chardev", f"socket,id=console,fd={console_fd}"),
        *("-serial", "chardev:console"),
        *("-kernel", str(spec.kernel)),
        *(("-initrd", str(spec.initrd)) if spec.initrd else ()),
        *("-append", command_line),
        *_disk_arguments(spec.disk),
        *("-netdev", user_network),
        *("-device", "virtio-net-pci,netdev=net0,romfile="),
        *("-device", "virtio-rng-pci"),
        *("-chardev", f"socket,id=port,fd={port_fd}"),
        *("-device", "virtio-serial-pci,max_ports=2"),
        *("-device", f"virtserialport,chardev=port,name={PORT_NAME}"),
        # Until the guest answers, a reset is a failed boot: see Machine.booted. One that is
        # restored has answered before.
        *(() if spec.state else ("-action", "reboot=shutdown")),
        *(("-incoming", "defer") if spec.state else ()),
    ]


def listening_address(spec: MachineSpec) -> str:
    """Where QEMU listens for connections to the guest; in its namespace, if it has one."""
    return "127.0.0.1" if spec.network == "isolated" else nat.ADDRESS


def _machine(spec: MachineSpec, architecture: Architecture) -> str:
    backend = f",memory-backend={architecture.memory_name}" if spec.memory else ""
    return architecture.machine + backend


def _memory_arguments(spec: MachineSpec, architecture: Architecture) -> list[str]:
    if spec.memory is None:
        return []
    backend = {
        "qom-type": "memory-backend-file",
        "id": architecture.memory_name,
        "size": spec.mem_size_mib << 20,
        "mem-path": str(spec.memory.path),
        "share": spec.memory.shared,
    }
    return ["-object", json.dumps(backend)]


def kernel_command_line(boot_args: str, architecture: Architecture, read_only: bool) -> str:
    """What goes on the kernel's command line for the boot that ``boot_args`` ask for.

    Beyond what ``kernel_args`` tells of: ``pci=off`` goes, since the disk, the network and the
    console are on PCI; ``reboot=k`` becomes ``reboot=t`` on x86: there is no keyboard controller
    to reset through, and trying costs more than a second.
    """
    return kernel_args.kernel_command_line(
        boot_args,
        console=architecture.console,
        read_only=read_only,
        replaced={
            "pci=off": None,
            **({"reboot=k": "reboot=t"} if architecture.name == "x86_64" else {}),
        },
    )


def _disk_arguments(disk: Disk) -> list[str]:
    node = _block_node(disk.image, read_only=disk.read_only)
    over = node
    for image in disk.backing:
        # Named here rather than taken from the overlay's header, which anyone
        # who can write the file could have pointed elsewhere.
        over["backing"] = _block_node(image, read_only=True)
        over = over["backing"]
    node["node-name"] = "disk0"
    return [
        *("-blockdev", json.dumps(node)),
        *("-device", "virtio-blk-pci,drive=disk0"),
    ]


def _block_node(image: Image, *, read_only: bool) -> dict[str, Any]:
    node: dict[str, Any] = {
        "driver": image.format,
        "read-only": read_only,
        "file": {
            "driver": "file",
            "filename": str(image.path.absolute()),
            "read-only": read_only,
        },
    }
    if image.format == "qcow2":
        node["discard"] = "unmap"
        node["file"]["discard"] = "unmap"
        # None stops QEMU from opening whatever a hostile header might name.
        node["backing"] = None
    return node


def _key_values(first: str, **pairs: str) -> str:
    """QEMU's ``a,key=value`` syntax, in which a comma inside a value is doubled."""
    return ",".join([first, *(f"{key}={value.replace(',', ',,')}" for key, value in pairs.items())])
