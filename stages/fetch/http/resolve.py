"""Names to addresses that may be connected to. Looked up by the system's resolver, and remembered for a while."""

import asyncio
import socket
import time

from aiohttp.abc import AbstractResolver, ResolveResult

from schemas.drops import Dropped, DropReason
from stages.fetch.address import Guard, literal
from stages.fetch.answer import LOCAL_TROUBLE
from stages.fetch.engine import RESOLVER, Stopwatch
from stages.fetch.once import Once

_KEPT_S = 300.0
_MOST_HOSTS = 20_000
_MOST_TRIED = 4
"""Addresses that are tried of one name; an answer may hold hundreds."""
_MOST_SEEN = 64
"""Addresses that are looked at of one name, to see one that is allowed."""

Addresses = list[tuple[socket.AddressFamily, str]]


def look_up(host: str, stopwatch: Stopwatch) -> Addresses:
    """All addresses of a name, from the system's resolver; a drop as DNS_ERROR when it has none. Blocks."""
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
        self._guard = guard

        def learn(host: str) -> asyncio.Future[Addresses]:
            return asyncio.get_running_loop().run_in_executor(None, look_up, host, stopwatch)

        self._known = Once(learn, _KEPT_S, _MOST_HOSTS)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The first few addresses of a name (or the one that it spells out) that may be connected to.

        Raises:
            Dropped: DNS_ERROR when it has none, FORBIDDEN_ADDRESS when none of them may.
        """
        address = literal(host)
        if address is not None:
            addresses: Addresses = [(socket.AF_INET if address.version == 4 else socket.AF_INET6, str(address))]
        else:
            addresses = await self._known.get(host)
        permitted = [each for each in addresses if self._guard.allows(each[1], port)]
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
