"""Debian's root file system, made by mmdebstrap: as an ordinary user, or as root."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pytest_smolvm.errors import ImageError
from pytest_smolvm.images import namespaces
from pytest_smolvm.images.cache import Progress
from pytest_smolvm.process import ToolError, find_tool, run_tool

FORMAT = 1
"""Raised whenever the same release would make another image."""

RELEASES = {"12": "bookworm", "13": "trixie"}
PACKAGES = ("ca-certificates", "iproute2", "kmod", "passwd", "procps", "python3")
"""What a guest is expected to have, beside what every Debian has."""

_TIMEOUT_S = 1800


def suite_of(release: str) -> str:
    """The code name of a release given by number or by name."""
    suite = RELEASES.get(release, release)
    if suite not in RELEASES.values():
        known = ", ".join(f"{number} ({name})" for number, name in RELEASES.items())
        raise ImageError(f"there is no Debian {release!r} here: use one of {known}")
    return suite


def recipe(suite: str, size_mb: int) -> dict[str, object]:
    """What is asked for, as JSON."""
    return {"recipe": ["debian", FORMAT, suite, *PACKAGES], "size_mb": size_mb}


def make_debian_tar(
    suite: str,
    packages: Sequence[str],
    architecture: str,
    mirror: str | None,
    tar: Path,
    say: Progress,
) -> None:
    """Write the root file system of a Debian release as a tar archive.

    With user namespaces no rights are needed. Raises ``ImageError``.
    """
    mmdebstrap = find_tool("mmdebstrap", "mmdebstrap")
    say(f"making Debian {suite} with mmdebstrap")
    argv = [
        mmdebstrap,
        "--mode=root",  # as which it finds itself, whoever we are
        "--variant=apt",
        f"--architectures={architecture}",
        f"--include={','.join(packages)}",
        # One name service for a guest in any network: see images/guestfiles.py.
        "--customize-hook=rm -f $1/etc/resolv.conf",
        "--customize-hook=: > $1/etc/resolv.conf",
        "--customize-hook=: > $1/etc/machine-id",
        suite,
        str(tar),
        *([mirror] if mirror else []),
    ]
    with namespaces.work_folder("mmdebstrap") as folder:
        try:
            run_tool(
                [*namespaces.as_root(), *namespaces.ends_whole(), *argv],
                timeout_s=_TIMEOUT_S,
                env={"TMPDIR": str(folder), "LC_ALL": "C"},
            )
        except ToolError as error:
            raise ImageError(
                f"Debian {suite} could not be made. {namespaces.advice()}\n{error.message}"
            ) from error
