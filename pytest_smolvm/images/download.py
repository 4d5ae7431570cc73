"""Files from a mirror: taken up again where they broke off, checked before anybody sees them."""

from __future__ import annotations

import errno
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from pytest_smolvm.errors import ImageError
from pytest_smolvm.process import Deadline
from pytest_smolvm.statedir import locked, make_private_dir

_SILENCE_S = 60.0
_TIMEOUT_S = 1800.0
_TRIES = 4
_PAUSE_S = 0.5
_BLOCK = 1 << 16
_RANGE_IS_WRONG = 416


class NotThereError(ImageError):
    """The mirror has no such file."""


class _BrokenOffError(Exception):
    """The connection ended too early; what came is kept."""


def download(url: str, target: Path, check: Callable[[Path], None]) -> None:
    """Make ``target`` what lies at ``url`` (http, https, file), unless it is there.

    What is there of an earlier try is not fetched again. ``check`` is given the whole file and
    raises ``ImageError`` if it is not what it should be; a file that was put together of several
    tries is fetched anew then, once. Raises ``ImageError``; ``NotThereError`` if there is no such
    file.
    """
    if target.exists():
        return
    make_private_dir(target.parent)
    deadline = Deadline(_TIMEOUT_S)
    with locked(
        target.with_name(f".{target.name}.lock"),
        operation=f"waiting for another process to download {url}",
        timeout_s=_TIMEOUT_S,
    ):
        if target.exists():
            return
        part = target.with_name(f".{target.name}.part")
        pieces = _fetch(url, part, deadline)
        try:
            check(part)
        except ImageError:
            part.unlink()
            if pieces == 1:
                raise
            _fetch(url, part, deadline)
            try:
                check(part)
            except ImageError:
                part.unlink()
                raise
        part.replace(target)


def _fetch(url: str, part: Path, deadline: Deadline) -> int:
    """Fetch what ``part`` lacks; return of how many pieces it was put together."""
    pieces = 1 if part.exists() else 0
    for tries_left in reversed(range(_TRIES)):
        try:
            _append(url, part, deadline)
            return pieces + 1
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (404, 410):
                    raise NotThereError(f"there is no {url}", {"url": url}) from None
                if error.code == _RANGE_IS_WRONG:
                    part.unlink(missing_ok=True)
                elif error.code < 500 or not tries_left:
                    raise _failed(url, f"{error.code} {error.reason}") from None
        except (_BrokenOffError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, FileNotFoundError):
                raise NotThereError(f"there is no {url}", {"url": url}) from None
            if getattr(reason, "errno", None) == errno.ENOSPC:
                raise _failed(url, f"the disk with {part.parent} is full") from None
            if not tries_left or deadline.passed():
                raise _failed(url, str(reason) or type(reason).__name__) from None
        pieces += part.exists()
        time.sleep(_PAUSE_S)
    raise _failed(url, "the mirror refuses to go on where it broke off")


def _append(url: str, part: Path, deadline: Deadline) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url)  # noqa: S310 - whose mirror it is, they say
    if have and not url.startswith("file:"):
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=_SILENCE_S) as answer:  # noqa: S310
        goes_on = getattr(answer, "status", None) == http.client.PARTIAL_CONTENT
        said = answer.headers.get("Content-Length")
        wanted = int(said) if said and said.isdigit() else None
        came = 0
        with part.open("ab" if goes_on else "wb") as file:
            while block := answer.read(_BLOCK):
                file.write(block)
                came += len(block)
                if deadline.passed():
                    raise _failed(url, f"it was not done within {_TIMEOUT_S:g} s")
    if wanted is not None and came != wanted:
        raise _BrokenOffError(f"it broke off after {came} of {wanted} bytes")


def _failed(url: str, why: str) -> ImageError:
    return ImageError(
        f"{url} could not be downloaded: {why}. Is the network up? What has come is kept, and "
        "the next try goes on from there",
        {"url": url},
    )
