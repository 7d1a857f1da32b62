"""Names to addresses that may be connected to. Looked up by the system's resolver, and remembered for a while."""

import asyncio
import socket
from collections import OrderedDict
from typing import NamedTuple

from schemas.drops import DropReason
from stages.base import Dropped
from stages.fetch.address import Guard, literal
from stages.fetch.base import LOCAL_TROUBLE

_KEPT_S = 300.0
_FAILED_S = 60.0
_MOST_HOSTS = 20_000
_MOST_PLACES = 4
"""Addresses that are tried of one name; an answer may hold hundreds."""
SHARE_OF_DEADLINE = 0.25
"""For an address that does not answer, where a name has several."""
_MOST_FOUND = 64
"""Addresses that are looked at of one name, to find one that is allowed."""


class Place(NamedTuple):
    """Where a socket connects to."""

    family: int
    address: str


Answer = list[Place] | DropReason
"""The addresses of a name, or why there are none."""


def look_up(host: str) -> list[Place]:
    """All addresses of a name, from the system's resolver. Blocks.

    Raises:
        Dropped: DNS_ERROR when it has none.
        OSError: for this machine's own trouble.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except UnicodeError as error:  # a label that is empty or too long
        raise Dropped(DropReason.DNS_ERROR) from error
    except OSError as error:
        if error.errno in LOCAL_TROUBLE or error.errno == socket.EAI_MEMORY:
            raise
        raise Dropped(DropReason.DNS_ERROR) from error
    return [Place(family, str(place[0])) for family, _, _, _, place in found[:_MOST_FOUND]]


def permitted(found: list[Place], port: int, guard: Guard) -> list[Place]:
    """Those of a name's addresses that may be connected to, the first few.

    Raises:
        Dropped: FORBIDDEN_ADDRESS when none of them may.
    """
    places = [place for place in found if guard.permits(place.address, port)]
    if not places:
        raise Dropped(DropReason.FORBIDDEN_ADDRESS)
    return places[:_MOST_PLACES]


class Resolver:
    """Look-ups of the native engine: in threads, one at a time per name, remembered. Used on the loop alone."""

    def __init__(self) -> None:
        """Know nothing."""
        self._known: OrderedDict[str, tuple[float, Answer]] = OrderedDict()
        self._asked: dict[str, asyncio.Task[Answer]] = {}

    async def places(self, host: str) -> list[Place]:
        """All addresses of a name, or the one that it spells out.

        Raises:
            Dropped: DNS_ERROR when it has none.
        """
        address = literal(host)
        if address is not None:
            return [Place(socket.AF_INET if address.version == 4 else socket.AF_INET6, str(address))]
        until, answer = self._known.get(host, (0.0, DropReason.DNS_ERROR))
        if until < asyncio.get_running_loop().time():
            # Whoever waits may run out of time; the answer is still good for those after.
            answer = await asyncio.shield(self._asked.get(host) or self._start(host))
        if isinstance(answer, DropReason):
            raise Dropped(answer)
        return answer

    async def close(self) -> None:
        """Give up the look-ups that nobody waits for any more."""
        for task in self._asked.values():
            task.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)

    def _start(self, host: str) -> "asyncio.Task[Answer]":
        task = self._asked[host] = asyncio.get_running_loop().create_task(self._ask(host))
        return task

    async def _ask(self, host: str) -> Answer:
        loop = asyncio.get_running_loop()
        answer: Answer
        try:
            answer = await loop.run_in_executor(None, look_up, host)
        except Dropped as dropped:
            answer = dropped.reason
        finally:
            del self._asked[host]
        kept_s = _FAILED_S if isinstance(answer, DropReason) else _KEPT_S
        self._known[host] = loop.time() + kept_s, answer
        self._known.move_to_end(host)
        if len(self._known) > _MOST_HOSTS:
            self._known.popitem(last=False)
        return answer
