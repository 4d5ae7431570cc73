"""Firecracker's HTTP API on its unix socket: what is asked, what is answered, what is refused.

Written to the specification of release 1.16 (src/firecracker/swagger/firecracker.yaml in its
sources): paths, fields and limits are those. What this library does not use is left out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pytest_smolvm.errors import BackendError, OperationTimeoutError
from pytest_smolvm.hostloop import await_result

logger = logging.getLogger(__name__)

SPOKEN = (1, 16)
"""The release whose API this is."""
OLDEST = (1, 8)
"""The first whose devices a kernel finds through ACPI, as distributions' kernels must."""
CLOCK_REALTIME_SINCE = (1, 16)
REQUEST_TIMEOUT_S = 30.0
_ANSWER_LIMIT_BYTES = 1 << 20


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MachineConfiguration(_Request):
    """``PUT /machine-config``"""

    vcpu_count: Annotated[int, Field(ge=1, le=32)]
    mem_size_mib: Annotated[int, Field(ge=1)]
    smt: bool = False
    track_dirty_pages: bool = False


class BootSource(_Request):
    """``PUT /boot-source``: paths on this host."""

    kernel_image_path: str
    initrd_path: str | None = None
    boot_args: str | None = None


class Drive(_Request):
    """``PUT /drives/{drive_id}``

    One that is no root device: the kernel's command line says where the root is.
    """

    drive_id: str
    path_on_host: str
    is_root_device: bool = False
    is_read_only: bool = False
    cache_type: Literal["Unsafe", "Writeback"] = "Unsafe"
    io_engine: Literal["Sync", "Async"] = "Sync"


class NetworkInterface(_Request):
    """``PUT /network-interfaces/{iface_id}``: ``host_dev_name`` is a TAP device."""

    iface_id: str
    host_dev_name: str
    guest_mac: str | None = None


class EntropyDevice(_Request):
    """``PUT /entropy``"""


class Vsock(_Request):
    """``PUT /vsock``: Firecracker listens on ``uds_path``."""

    guest_cid: Annotated[int, Field(ge=3)]
    uds_path: str


class Action(_Request):
    """``PUT /actions``"""

    action_type: Literal["InstanceStart", "SendCtrlAltDel", "FlushMetrics"]


class VmState(_Request):
    """``PATCH /vm``"""

    state: Literal["Paused", "Resumed"]


class SnapshotCreate(_Request):
    """``PUT /snapshot/create``, of a paused machine."""

    snapshot_path: str
    mem_file_path: str
    snapshot_type: Literal["Full", "Diff"] = "Full"


class MemoryBackend(_Request):
    """Where a loaded machine's memory comes from: a file is mapped privately."""

    backend_path: str
    backend_type: Literal["File", "Uffd"] = "File"


class SnapshotLoad(_Request):
    """``PUT /snapshot/load``, before anything was configured; the machine is paused then."""

    snapshot_path: str
    mem_backend: MemoryBackend
    resume_vm: bool = False
    clock_realtime: bool | None = None
    """Whether the guest's monotonic clock goes on by the time since (x86; from 1.16 on)."""


class _Answer(BaseModel):
    # A later release may tell more.
    model_config = ConfigDict(frozen=True, extra="ignore")


class InstanceInfo(_Answer):
    """``GET /``"""

    id: str
    state: Literal["Not started", "Running", "Paused"]
    vmm_version: str
    app_name: str


class Version(_Answer):
    """``GET /version``"""

    firecracker_version: str


class Fault(_Answer):
    """The body of every refusal."""

    fault_message: str = ""


AnswerT = TypeVar("AnswerT", bound=_Answer)


def release_of(version: str) -> tuple[int, int]:
    """Major and minor number of a version such as ``1.16.1``; ``BackendError`` if it is none."""
    found = re.match(r"v?(\d+)\.(\d+)", version)
    if found is None:
        raise BackendError(
            f"Firecracker says that its version is {version[:80]!r}, which is no version: "
            "is that program really Firecracker?"
        )
    return int(found[1]), int(found[2])


def check_release(version: str) -> tuple[int, int]:
    """Raise for a release that is too old, or of another major number than what is spoken."""
    release = release_of(version)
    if release < OLDEST:
        raise BackendError(
            f"Firecracker {version} is too old: this library needs {OLDEST[0]}.{OLDEST[1]} or "
            f"later, and speaks the API of {SPOKEN[0]}.{SPOKEN[1]}",
            {"version": version},
        )
    if release[0] != SPOKEN[0]:
        raise BackendError(
            f"Firecracker {version} is unknown to this library, which speaks the API of "
            f"{SPOKEN[0]}.{SPOKEN[1]}: install a release {SPOKEN[0]}.x",
            {"version": version},
        )
    return release


class Api:
    """The API of one Firecracker process. ``circumstances`` may explain that it is silent."""

    def __init__(self, socket: Path | str, circumstances: Callable[[], str] = str) -> None:
        self._circumstances = circumstances
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(socket)),
            base_url="http://localhost",
            timeout=None,  # noqa: S113 - await_result() has the deadline, for all of a request
        )

    def get(self, path: str, answer: type[AnswerT]) -> AnswerT:
        """What ``path`` tells."""
        text = self._ask("GET", path, None, REQUEST_TIMEOUT_S)
        try:
            return answer.model_validate_json(text)
        except ValidationError as error:
            raise BackendError(
                f"Firecracker answered GET {path} with what its specification does not know: "
                f"{text[:200].decode(errors='replace')!r} ({error.error_count()} errors)"
            ) from error

    def put(self, path: str, request: _Request, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        """Have ``path`` be what is asked for."""
        self._ask("PUT", path, request, timeout_s)

    def patch(self, path: str, request: _Request, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        """Change ``path``."""
        self._ask("PATCH", path, request, timeout_s)

    def close(self) -> None:
        """Close the connection."""
        await_result(self._client.aclose(), operation="closing Firecracker's API", timeout_s=5)

    def _ask(self, method: str, path: str, request: _Request | None, timeout_s: float) -> bytes:
        what = f"Firecracker's {method} {path}"
        body = None if request is None else request.model_dump(mode="json", exclude_none=True)
        logger.debug("%s %s", what, body)
        try:
            status, answer = await_result(
                self._exchange(method, path, body), operation=what, timeout_s=timeout_s
            )
        except OperationTimeoutError:
            raise OperationTimeoutError(
                what, timeout_s, f"Firecracker does not answer{self._circumstances()}"
            ) from None
        except (httpx.HTTPError, _AnswerTooLongError) as error:
            raise BackendError(
                f"{what}: no answer that can be understood: {error or type(error).__name__}"
                f"{self._circumstances()}"
            ) from error
        if status >= 400:
            raise _refusal(what, status, answer)
        return answer

    async def _exchange(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        async with self._client.stream(method, path, json=body) as response:
            answer = b""
            async for block in response.aiter_bytes():
                answer += block
                if len(answer) > _ANSWER_LIMIT_BYTES:
                    raise _AnswerTooLongError(f"more than {_ANSWER_LIMIT_BYTES >> 20} MiB")
        return response.status_code, answer


class _AnswerTooLongError(Exception):
    """Nothing that Firecracker has to say is that long."""


def _refusal(what: str, status: int, answer: bytes) -> BackendError:
    try:
        fault = Fault.model_validate_json(answer).fault_message
    except ValidationError:
        fault = answer[:500].decode(errors="replace")
    return BackendError(
        f"{what} was refused with status {status}: {fault or 'without a reason'}",
        {"status": status, "fault_message": fault},
    )
