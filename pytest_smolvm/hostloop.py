"""One background thread per process: it runs an event loop and starts the VMs.

QMP is asynchronous, this library's interface is not, so coroutines run on a
loop of their own that no test's loop can collide with. The same thread starts
every virtual machine: the kernel's parent-death signal follows the *thread*
that forked, and this one lives as long as the process does.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from pytest_smolvm.errors import OperationTimeoutError

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
