"""An asyncio loop in a thread of its own, for callers in any thread."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """One loop in a daemon thread."""

    def __init__(self, blocking_threads: int) -> None:
        """`blocking_threads` look-ups of names (and other blocking calls) can run at a time."""
        self._loop = asyncio.new_event_loop()
        self._pool = ThreadPoolExecutor(blocking_threads, thread_name_prefix="faceshards-resolve")
        self._loop.set_default_executor(self._pool)
        self._thread = Thread(target=self._loop.run_forever, name="faceshards-fetch", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; when the caller is interrupted, the work is cancelled."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function on the loop, soon; never, once the loop has stopped."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        # A look-up that hangs must not hold up the end of the process.
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._loop.close()
