"""Connections that wait for a further request to the same host."""

import asyncio
from collections import deque
from typing import NamedTuple

from stages.fetch.address import Origin
from stages.fetch.http.link import Link

_IDLE_S = 1.0
"""Most hosts are not asked twice in a row, and each idle connection costs a file descriptor."""


class _Idle(NamedTuple):
    link: Link
    until: float


class Pool:
    """Idle links by origin; used on the loop alone."""

    def __init__(self, most: int) -> None:
        """Keep at most so many."""
        self._most = most
        self._idle: dict[Origin, deque[_Idle]] = {}
        self._count = 0
        self._sweeper: asyncio.TimerHandle | None = None

    def take(self, origin: Origin) -> Link | None:
        """An idle link to this origin, the one that was used last; None when there is none."""
        waiting = self._idle.get(origin)
        while waiting:
            self._count -= 1
            link = waiting.pop().link
            if not link.closed:
                link.wake()
                return link
        self._idle.pop(origin, None)
        return None

    def put(self, origin: Origin, link: Link) -> None:
        """Keep a link for a while."""
        if self._count >= self._most:
            link.close()
            return
        link.rest()
        self._count += 1
        loop = asyncio.get_running_loop()
        self._idle.setdefault(origin, deque()).append(_Idle(link, loop.time() + _IDLE_S))
        if self._sweeper is None:
            self._sweeper = loop.call_later(_IDLE_S, self._sweep)

    def close(self) -> None:
        """Close all."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._expire(float("inf"))

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        self._expire(loop.time())
        self._sweeper = loop.call_later(_IDLE_S, self._sweep) if self._idle else None

    def _expire(self, now: float) -> None:
        for origin, waiting in list(self._idle.items()):
            while waiting and (waiting[0].until <= now or waiting[0].link.closed):
                waiting.popleft().link.close()
                self._count -= 1
            if not waiting:
                del self._idle[origin]
