"""What is said of forwarded ports that cannot be had, or are not there; whatever the backend."""

from __future__ import annotations

from collections.abc import Collection

from pytest_smolvm.errors import SmolVMError


def cannot_forward(host_port: int, guest_port: int, why: str) -> SmolVMError:
    """The error for a port of this host that cannot lead to the guest's."""
    return SmolVMError(
        f"port {host_port} of 127.0.0.1 cannot be forwarded to port {guest_port} of the "
        f"guest: it is in use, or not allowed; give another host_port, or None for any "
        f"free one ({why})",
        {"host_port": host_port, "guest_port": guest_port},
    )


def check_forwarded(host_port: int, forwarded: Collection[int]) -> None:
    """Raise unless ``host_port`` is one of those that lead to the VM."""
    if host_port not in forwarded:
        raise SmolVMError(
            f"port {host_port} of 127.0.0.1 is not forwarded to this VM: the forwarded ones "
            f"are {sorted(forwarded) or 'none'}",
            {"host_port": host_port, "forwarded": sorted(forwarded)},
        )
