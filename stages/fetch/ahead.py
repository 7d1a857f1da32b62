"""What is fetched before its turn: any order within, the callers' order outside, bounded in rows and in bytes."""

import asyncio
import heapq
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from itertools import islice
from threading import Event

from stages.fetch.engine import Outcome

MOST_BYTES = 256 << 20
"""Of bodies that came, or are coming, before their turn, per stream. Beyond it only the row whose turn it
is begins its download; those that were begun go on."""
_PORTION = 256
"""URLs that are begun together."""
_OFTEN = 16
"""Outcomes that are taken between two looks whether others may begin."""
_NEAR = 128
"""URLs that are fetched however much waits behind them: one after the other they would take a round trip each."""


class Pending:
    """A URL of a stream, from its begin to its outcome."""

    def __init__(self, ahead: "Ahead", url: str | None, index: int) -> None:
        self.ahead = ahead
        self.url = url
        self.index = index
        """Its position in the stream."""
        self.work: asyncio.Future[Outcome] | Future[Outcome] | None = None
        """The task of the loop, or the call in a thread, that fetches it."""
        self._weight = 0

    def begin(self, work: asyncio.Future[Outcome] | Future[Outcome]) -> None:
        self.work = work
        work.add_done_callback(self._done)

    def weigh(self, size: int) -> None:
        """Count so many bytes as held for this URL. Called on the loop alone."""
        self.ahead.arrived += size - self._weight
        self._weight = size

    def _done(self, _: object) -> None:
        if self.ahead.awaited is self:
            self.ahead.ready.set()

    def result(self) -> Outcome | None:
        """The outcome, which is not held any more, None while it is not there; raises what stopped the work."""
        if self.work is None or not self.work.done():
            return None
        self.ahead.taken += self._weight
        return self.work.result()


class Ahead:
    """One stream: its URLs that were begun and whose outcomes were not taken yet, and what they weigh.

    The loop writes `is_held_back` before it reads `awaited` once more; the thread that takes outcomes writes `awaited`
    before it reads `is_held_back`: so no lock is needed.
    """

    def __init__(self) -> None:
        self.arrived = self.taken = 0
        """Bytes that came, and those of them that were handed out."""
        self.awaited: Pending | None = None
        """The URL whose outcome is waited for, or was the last to be taken."""
        self.is_held_back = False
        """Downloads wait for bytes to be taken, or for their turn."""
        self.ready = Event()
        self._held_back: list[tuple[int, asyncio.Future[None]]] = []
        """A heap: those whose turn comes first are let go first."""

    def may_begin(self, index: int) -> bool:
        """Whether the download of the URL at this position may begin now."""
        is_near = self.awaited is not None and index < self.awaited.index + _NEAR
        return is_near or self.arrived - self.taken < MOST_BYTES

    async def room(self, index: int) -> None:
        """Wait until the download of the URL at this position may begin. Who waits here must hold nothing."""
        while not self.may_begin(index):
            self.is_held_back = True
            if self.may_begin(index):  # its turn may have come just before that was written
                return
            waiter = asyncio.get_running_loop().create_future()
            heapq.heappush(self._held_back, (index, waiter))
            await waiter

    def go_on(self) -> None:
        """Let some begin that may; called on the loop."""
        for _ in range(_PORTION):
            if not self._held_back or not self.may_begin(self._held_back[0][0]):
                break
            _, waiter = heapq.heappop(self._held_back)
            if not waiter.done():
                waiter.set_result(None)
        self.is_held_back = bool(self._held_back)

    def outcomes(
        self,
        urls: Iterable[str | None],
        most_rows: int,
        begin: Callable[[Sequence[Pending]], None],
        call: Callable[..., None],
    ) -> Iterator[Outcome]:
        """Outcomes in the order of `urls`, which is read as far ahead as is begun: up to `most_rows` before their turn.

        `begin` starts the work on some URLs, `call` calls a function on the loop.
        """
        source, waiting = enumerate(urls), deque[Pending]()
        portion = min(_PORTION, most_rows)
        try:
            while True:
                while len(waiting) <= most_rows - portion:
                    begun = [Pending(self, url, index) for index, url in islice(source, portion)]
                    if not begun:
                        break
                    waiting.extend(begun)
                    begin(begun)
                if not waiting:
                    return
                self.awaited = waiting.popleft()
                while (outcome := self.awaited.result()) is None:
                    if self.is_held_back:
                        call(self.go_on)
                    self.ready.wait()
                    self.ready.clear()
                if self.is_held_back and self.awaited.index % _OFTEN == 0:
                    call(self.go_on)
                yield outcome
        finally:
            left = [*waiting, *filter(None, [self.awaited])]
            call(lambda: [pending.work.cancel() for pending in left if pending.work is not None])


class Slots:
    """So many downloads at a time, those first whose turn comes first; used on the loop alone.

    Whoever was here first would not do: the rows of a host come here together once its robots.txt is known, and would
    open all its connections at the same time, only to leave them unused afterwards.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        """A heap."""

    @asynccontextmanager
    async def held(self, index: int) -> AsyncIterator[None]:
        """Hold a slot for the URL at this position of its stream."""
        if self._free > 0:
            self._free -= 1
        else:
            granted = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (index, id(granted), granted))
            try:
                await granted
            except asyncio.CancelledError:
                if granted.done() and not granted.cancelled():
                    self._release()
                raise
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        while self._waiting:
            _, _, granted = heapq.heappop(self._waiting)
            if not granted.done():
                granted.set_result(None)
                return
        self._free += 1
