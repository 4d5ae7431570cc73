"""Alpine's root file system, installed by its own apk: as an ordinary user, or as root.

What a release's minirootfs holds, and a little more, but from packages, of which each is checked
by a key that is part of this library; the minirootfs itself is signed in another way, with a key
that no mirror has.
"""

from __future__ import annotations

import re
from pathlib import Path

from pytest_smolvm.errors import ImageError
from pytest_smolvm.images import namespaces
from pytest_smolvm.images.alpine import AlpinePackages, keys_folder
from pytest_smolvm.images.cache import Progress, StalePackagesError
from pytest_smolvm.process import ToolError, find_tool, run_tool

FORMAT = 1
"""Raised whenever the same release would make another image."""

PACKAGES = (
    # A minirootfs: alpine-baselayout, alpine-keys, alpine-release, apk-tools, busybox, libc-utils.
    *("alpine-baselayout", "alpine-keys", "alpine-release", "apk-tools", "busybox", "musl-utils"),
    # What a guest is expected to have beside that: its kernel's modules, services, TLS.
    *("busybox-openrc", "ca-certificates", "kmod", "openrc"),
)
_TIMEOUT_S = 1800

_SCRIPT = """
apk=$1 keys=$2 arch=$3 root=$4 tar=$5 repository=$6
shift 6
"$apk" --root "$root" --initdb --arch "$arch" --keys-dir "$keys" --repositories-file /dev/null \\
    --repository "$repository" --no-cache --no-progress --no-interactive add "$@" >&2
printf '%s\\n' "$repository" "${repository%/*}/community" > "$root/etc/apk/repositories"
: > "$root/etc/machine-id"
: > "$root/etc/resolv.conf"
tar --one-file-system --numeric-owner -C "$root" -cf "$tar" .
"""


def check_release(release: str) -> str:
    """A release's number, as in the mirror's folders."""
    if not re.fullmatch(r"3\.\d{1,3}", release):
        raise ImageError(f"{release!r} is no release of Alpine: give one such as '3.23'")
    return release


def recipe(release: str, size_mb: int) -> dict[str, object]:
    """What is asked for, as JSON."""
    return {"recipe": ["alpine", FORMAT, release, *PACKAGES], "size_mb": size_mb}


def make_alpine_tar(
    packages: AlpinePackages, architecture: str, work: Path, tar: Path, say: Progress
) -> None:
    """Write the root file system of an Alpine release as a tar archive.

    With user namespaces no rights are needed. Raises ``ImageError``.
    """
    find_tool("tar", "tar")
    unpacked = work / "apk"
    packages.unpack(_download_apk(packages), unpacked)
    say(f"installing Alpine from {packages.repository}")
    with namespaces.work_folder("apk") as folder:
        root = folder / "root"
        root.mkdir()
        argv = ["sh", "-euc", _SCRIPT, "sh", str(unpacked / "sbin/apk.static")]
        argv += [str(keys_folder(architecture)), architecture, str(root), str(tar)]
        try:
            run_tool(
                [
                    *(*namespaces.as_root(), *namespaces.ends_whole(), *argv),
                    *(packages.repository, *PACKAGES),
                ],
                timeout_s=_TIMEOUT_S,
                env={"LC_ALL": "C"},
            )
        except ToolError as error:
            raise ImageError(
                f"Alpine could not be installed. {namespaces.advice()}\n{error.message}"
            ) from error


def _download_apk(packages: AlpinePackages) -> Path:
    try:
        (path,) = packages.download(packages.resolve([], ["apk-tools-static"]))
    except StalePackagesError:
        packages.refresh()
        (path,) = packages.download(packages.resolve([], ["apk-tools-static"]))
    return path
