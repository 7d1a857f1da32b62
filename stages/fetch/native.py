"""The native engine: asynchronous, one loop per process, stops reading as soon as an image cannot be kept."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence

from stages.fetch.ahead import Ahead, Pending
from stages.fetch.engine import MOST_ROWS, Outcome
from stages.fetch.fetcher import Fetcher
from stages.fetch.loop import LoopThread
from stages.fetch.times import FetchTimes
from stages.runtime import Runtime
from stages.settings import Settings

_RESOLVERS = 64


class Native:
    """Fetches on a loop of its own."""

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self._loop = LoopThread(_RESOLVERS)
        self._fetcher = self._loop.run(_made(settings, runtime))
        self._finalizer = weakref.finalize(self, _close, self._loop, self._fetcher)

    def stream(self, urls: Iterable[str | None], most_rows: int = MOST_ROWS) -> Iterator[Outcome]:
        return self.stream_by(lambda begun: self._loop.call(self._begin, begun), urls, most_rows)

    def stream_by(
        self, begin: Callable[[Sequence[Pending]], None], urls: Iterable[str | None], most_rows: int
    ) -> Iterator[Outcome]:
        """A stream of URLs whose work another begins."""
        self._fetcher.refusals.refresh()
        yield from Ahead().outcomes(urls, most_rows, begin, self._loop.call)

    def fetch(self, pending: Pending) -> Outcome:
        """The outcome of one URL; blocks."""
        return self._loop.run(self._fetcher.outcome(pending))

    def take_times(self) -> FetchTimes:
        return self._fetcher.stopwatch.take()

    def close(self) -> None:
        self._finalizer()

    def _begin(self, begun: Sequence[Pending]) -> None:
        self._fetcher.refusals.refresh()
        for pending in begun:
            pending.begin(self._fetcher.outcome(pending))


async def _made(settings: Settings, runtime: Runtime) -> Fetcher:
    return Fetcher(settings, runtime)


def _close(loop: LoopThread, fetcher: Fetcher) -> None:
    loop.run(fetcher.close())
    loop.stop()
