"""Initial RAM disks: drivers for the root disk, and, for imported guests, what those lack."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pytest_smolvm import keys
from pytest_smolvm.images import agent, cpio, guestfiles
from pytest_smolvm.images.guestfiles import COMPANION
from pytest_smolvm.images.kernel import ModuleTree
from pytest_smolvm.images.toolbox import (
    MODULES,
    MODULES_WITHOUT_PCI,
    Toolbox,
    with_interpreter,
)

_LINKER = f"{COMPANION}/ld.so"


def make_initrd(
    toolbox: Toolbox, modules: Path, companion: list[cpio.Entry] | None = None
) -> bytes:
    """One that loads the drivers among ``modules``, mounts the root disk and hands over to it."""
    tree = ModuleTree(modules)
    drivers = tree.load_order(MODULES)
    names = [name for name, _ in drivers]
    more = [each for each in tree.load_order(MODULES_WITHOUT_PCI) if each[0] not in names]
    entries = [cpio.directory(n) for n in ("bin", "dev", "proc", "modules", "root-disk")]
    entries += [
        cpio.character_device("dev/console", 5, 1),
        cpio.file("bin/busybox", toolbox.busybox.read_bytes(), 0o755),
        cpio.file(
            "init", guestfiles.initrd_init(names, [name for name, _ in more]).encode(), 0o755
        ),
    ]
    entries += [cpio.file(f"modules/{name}.ko", data) for name, data in [*drivers, *more]]
    return cpio.archive([*entries, *(companion or [])])


def can_do_without_pci(modules: Path) -> bool:
    """Whether a guest with those drivers finds disk and vsock on a machine without PCI."""
    return ModuleTree(modules).has(MODULES_WITHOUT_PCI)


def make_companion(
    toolbox: Toolbox, architecture: str, host_key: Ed25519PrivateKey, public_key: str
) -> list[cpio.Entry]:
    """What a guest that knows nothing of us is given: first process, SSH server, agent.

    All of it stays by itself, whatever C library the guest has: the SSH server brings its own
    libraries and its own dynamic linker.
    """
    server = with_interpreter(toolbox.ssh_server.read_bytes(), _LINKER)
    programs = {
        "init": guestfiles.COMPANION_INIT.encode(),
        "busybox": toolbox.busybox.read_bytes(),
        "dropbear": server,
        "ld.so": toolbox.interpreter().read_bytes(),
        "agent": agent.binary(architecture),
        "ssh-on-port": guestfiles.COMPANION_SSH_ON_PORT.encode(),
        **{f"bin/{name}": text.encode() for name, text in guestfiles.COMPANION_SCRIPTS.items()},
    }
    files = {
        "host_key": keys.private_dropbear(host_key),
        "authorized_keys": f"{public_key}\n".encode(),
        "resolv.conf": guestfiles.RESOLV_CONF.encode(),
    }
    files |= {f"lib/{path.name}": path.read_bytes() for path in toolbox.libraries().values()}
    public = {"resolv.conf"}
    return [
        *(cpio.directory(name) for name in ("smolvm", "smolvm/bin", "smolvm/lib")),
        *(cpio.file(f"smolvm/{name}", data, 0o755) for name, data in programs.items()),
        *(
            cpio.file(f"smolvm/{name}", data, 0o644 if _is_public(name, public) else 0o600)
            for name, data in files.items()
        ),
        *(
            cpio.symlink(f"smolvm/bin/{name}", "../busybox")
            for name in guestfiles.COMPANION_APPLETS
        ),
    ]


def _is_public(name: str, public: set[str]) -> bool:
    return name in public or name.startswith("lib/")
