"""The native engine: asynchronous, one loop in a thread, stops reading as soon as an image cannot be kept."""

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Any

from stages.fetch.ahead import Ahead, Pending
from stages.fetch.engine import MOST_ROWS, FetchTimes, Outcome
from stages.fetch.fetcher import Fetcher
from stages.runtime import Runtime
from stages.settings import Settings

_RESOLVERS = 64
"""Look-ups of names (and other blocking calls) at a time."""


class Native:
    """Fetches on a loop of its own, in a daemon thread."""

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self._loop = asyncio.new_event_loop()
        pool = ThreadPoolExecutor(_RESOLVERS, thread_name_prefix="faceshards-resolve")
        self._loop.set_default_executor(pool)
        thread = Thread(target=self._loop.run_forever, name="faceshards-fetch", daemon=True)
        thread.start()

        async def made() -> Fetcher:
            return Fetcher(settings, runtime)

        self._fetcher = asyncio.run_coroutine_threadsafe(made(), self._loop).result()
        self._finalizer = weakref.finalize(self, _close, self._loop, self._fetcher, thread, pool)

    def stream(self, urls: Iterable[str | None], most_rows: int = MOST_ROWS) -> Iterator[Outcome]:
        self._fetcher.refusals.refresh()
        yield from Ahead().outcomes(urls, most_rows, self._begin, self._call)

    def fetch(self, pending: Pending) -> Outcome:
        """The outcome of one URL; blocks, and gives it up when interrupted."""
        future = asyncio.run_coroutine_threadsafe(self._fetcher.outcome(pending), self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def take_times(self) -> FetchTimes:
        return self._fetcher.stopwatch.take()

    def close(self) -> None:
        self._finalizer()

    def _begin(self, begun: Sequence[Pending]) -> None:
        def begin() -> None:
            self._fetcher.refusals.refresh()
            for pending in begun:
                pending.begin(self._loop.create_task(self._fetcher.outcome(pending)))

        self._call(begin)

    def _call(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function on the loop, soon; never, once the loop has stopped."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)


def _close(loop: asyncio.AbstractEventLoop, fetcher: Fetcher, thread: Thread, pool: ThreadPoolExecutor) -> None:
    asyncio.run_coroutine_threadsafe(fetcher.close(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    # A look-up that hangs must not hold up the end of the process.
    pool.shutdown(wait=False, cancel_futures=True)
    loop.close()
