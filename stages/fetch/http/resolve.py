"""Names to addresses that may be connected to. Looked up by the system's resolver, and remembered for a while."""

import asyncio
import socket
import time
from collections import OrderedDict

from aiohttp.abc import AbstractResolver, ResolveResult

from schemas.drops import DropReason
from stages.base import Dropped
from stages.fetch.address import Guard, literal
from stages.fetch.status import LOCAL_TROUBLE
from stages.fetch.times import RESOLVER, Stopwatch

_KEPT_S = 300.0
_FAILED_S = 60.0
_MOST_HOSTS = 20_000
_MOST_TRIED = 4
"""Addresses that are tried of one name; an answer may hold hundreds."""
_MOST_SEEN = 64
"""Addresses that are looked at of one name, to see one that is allowed."""

Addresses = list[tuple[socket.AddressFamily, str]]


def look_up(host: str, stopwatch: Stopwatch) -> Addresses:
    """All addresses of a name, from the system's resolver. Blocks.

    Raises:
        Dropped: DNS_ERROR when it has none.
        OSError: for this machine's own trouble.
    """
    begun = time.monotonic()  # in the thread: to wait for one is not the resolver's time
    try:
        results = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except UnicodeError as error:  # a label that is empty or too long
        raise Dropped(DropReason.DNS_ERROR) from error
    except OSError as error:
        if error.errno in LOCAL_TROUBLE or error.errno == socket.EAI_MEMORY:
            raise
        raise Dropped(DropReason.DNS_ERROR) from error
    stopwatch.add(RESOLVER, time.monotonic() - begun)
    return [(family, str(address[0])) for family, _, _, _, address in results[:_MOST_SEEN]]


class Resolver(AbstractResolver):
    """aiohttp's source of addresses: looked up in threads, once per name, remembered. Used on the loop alone."""

    def __init__(self, guard: Guard, stopwatch: Stopwatch) -> None:
        self._guard, self._stopwatch = guard, stopwatch
        self._known: OrderedDict[str, tuple[float, Addresses | DropReason]] = OrderedDict()
        self._tasks: dict[str, asyncio.Task[Addresses | DropReason]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The first few addresses of a name (or the one that it spells out) that may be connected to.

        Raises:
            Dropped: DNS_ERROR when it has none, FORBIDDEN_ADDRESS when none of them may.
            OSError: for this machine's own trouble.
        """
        address = literal(host)
        if address is not None:
            addresses: Addresses = [(socket.AF_INET if address.version == 4 else socket.AF_INET6, str(address))]
        else:
            until, answer = self._known.get(host, (0.0, DropReason.DNS_ERROR))
            if until < asyncio.get_running_loop().time():
                if host not in self._tasks:
                    self._tasks[host] = asyncio.get_running_loop().create_task(self._look_up(host))
                # Whoever waits may run out of time; the answer is still good for those after.
                answer = await asyncio.shield(self._tasks[host])
            if isinstance(answer, DropReason):
                raise Dropped(answer)
            addresses = answer
        permitted = [each for each in addresses if self._guard.permits(each[1], port)]
        if not permitted:
            raise Dropped(DropReason.FORBIDDEN_ADDRESS)
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=family, proto=0, flags=int(socket.AI_NUMERICHOST)
            )
            for family, address in permitted[:_MOST_TRIED]
        ]

    async def close(self) -> None:
        """Aiohttp wants it; look-ups end with the loop."""

    async def _look_up(self, host: str) -> Addresses | DropReason:
        loop = asyncio.get_running_loop()
        answer: Addresses | DropReason
        try:
            answer = await loop.run_in_executor(None, look_up, host, self._stopwatch)
        except Dropped as dropped:
            answer = dropped.reason
        finally:
            del self._tasks[host]
        kept_s = _FAILED_S if isinstance(answer, DropReason) else _KEPT_S
        self._known[host] = loop.time() + kept_s, answer
        self._known.move_to_end(host)
        if len(self._known) > _MOST_HOSTS:
            self._known.popitem(last=False)
        return answer
