"""What is learned once per key, however many wait for it, and then remembered for a while."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from schemas.drops import Dropped, DropReason
from stages.fetch.answer import rest_s

K = TypeVar("K")
V = TypeVar("V")
FAILED_S = 60.0
"""How long it is remembered that something could not be learned, unless a server wants to be left alone for longer."""


class Once(Generic[K, V]):
    """Answers by their keys, the oldest forgotten first; used on the loop alone."""

    def __init__(
        self, learn: Callable[[K], Awaitable[V]], known_s: float, most: int, weigh: Callable[[V], int] = lambda _: 1
    ) -> None:
        """`most` is what all answers may weigh together; that there is none weighs 1."""
        self._learn, self._known_s, self._most, self._weigh = learn, known_s, most, weigh
        self._known: dict[K, tuple[float, V | DropReason, int]] = {}
        self._weight = 0
        self._tasks: dict[K, asyncio.Task[V | DropReason]] = {}

    async def get(self, key: K) -> V:
        """The answer, learned now unless it is known.

        Raises:
            Dropped: why it could not be learned; any other error passes through, and is not remembered.
        """
        until, known, _ = self._known.get(key, (0.0, DropReason.DNS_ERROR, 0))
        if until < time.monotonic():
            if key not in self._tasks:
                self._tasks[key] = asyncio.get_running_loop().create_task(self._learned(key))
            # Whoever waits may be given up; the answer is still good for those after.
            known = await asyncio.shield(self._tasks[key])
        if isinstance(known, DropReason):
            raise Dropped(known)
        return known

    async def _learned(self, key: K) -> V | DropReason:
        known: V | DropReason
        try:
            known = await self._learn(key)
            until, weight = time.monotonic() + self._known_s, self._weigh(known)
        except Dropped as dropped:
            known, until, weight = dropped.reason, time.monotonic() + max(FAILED_S, rest_s(dropped)), 1
        finally:
            del self._tasks[key]
        self._weight += weight - self._known.pop(key, (0.0, known, 0))[2]
        self._known[key] = until, known, weight
        while self._weight > self._most and len(self._known) > 1:
            self._weight -= self._known.pop(next(iter(self._known)))[2]
        return known
