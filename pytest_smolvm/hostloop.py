"""One background thread per process: it runs an event loop and starts the VMs.

QMP is asynchronous, this library's interface is not, so coroutines run on a
loop of their own that no test's loop can collide with. The same thread starts
every virtual machine: the kernel's parent-death signal follows the *thread*
that forked, and this one lives as long as the process does.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from pytest_smolvm.errors import OperationTimeoutError
from pytest_smolvm.identity import ProcessIdentity

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CANCEL_GRACE_S = 2.0


class _HostLoop:
    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.pid = os.getpid()
        started = threading.Event()
        self.thread = threading.Thread(
            target=self._run, args=(started,), name="smolvm-host-loop", daemon=True
        )
        self.thread.start()
        started.wait()

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.call_soon(started.set)
        self.loop.run_forever()


_guard = threading.Lock()
_current: _HostLoop | None = None


def _host_loop() -> _HostLoop:
    global _current
    with _guard:
        # A forked child has the object but not the thread.
        if _current is None or _current.pid != os.getpid():
            _current = _HostLoop()
        return _current


def await_result(coroutine: Coroutine[Any, Any, T], *, operation: str, timeout_s: float) -> T:
    """Run ``coroutine`` on the host loop and return its result.

    Past ``timeout_s`` seconds it is cancelled and ``OperationTimeoutError``
    names the ``operation``.
    """
    ended = threading.Event()

    async def run() -> T:
        try:
            return await coroutine
        finally:
            ended.set()

    future = asyncio.run_coroutine_threadsafe(run(), _host_loop().loop)
    try:
        return future.result(timeout_s)
    except concurrent.futures.TimeoutError:
        if future.done():  # the coroutine's own TimeoutError, not ours
            raise
        future.cancel()
        ended.wait(_CANCEL_GRACE_S)
        raise OperationTimeoutError(operation, timeout_s) from None
    except BaseException:
        # Ctrl-C, most likely. What cleans up next must not meet the coroutine
        # in the middle of its own clean-up.
        if not future.done():
            future.cancel()
            ended.wait(_CANCEL_GRACE_S)
        raise


def call_on_host_loop(function: Callable[[], T]) -> T:
    """Call a short blocking ``function`` on the thread that outlives all others."""

    async def call() -> T:
        return function()

    return await_result(call(), operation="starting a process", timeout_s=60)


def end_with(process: ProcessIdentity) -> None:
    """Have this process end at once, and with it its machines, when another one ends.

    Not by its parent-death signal, which would follow the thread that started us. Where the
    kernel cannot tell of a process's end (Linux before 5.3, macOS), nothing is done.
    """
    try:
        descriptor = os.pidfd_open(process.pid)
    except (AttributeError, OSError) as error:
        if not process.is_alive():
            os._exit(1)
        logger.debug("the end of process %d cannot be watched: %s", process.pid, error)
        return
    call_on_host_loop(lambda: asyncio.get_running_loop().add_reader(descriptor, os._exit, 1))
    if not process.is_alive():  # and its number may be another's by now
        os._exit(1)
