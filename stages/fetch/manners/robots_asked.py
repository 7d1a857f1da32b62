"""robots.txt for the native engine: fetched once per host, while its rows wait."""

import asyncio
from itertools import count

from schemas.drops import DropReason
from stages.base import Dropped
from stages.fetch.address import Origin, Url, redirected
from stages.fetch.base import check_status, wait_s
from stages.fetch.http.client import Client
from stages.fetch.manners import robots_txt
from stages.fetch.manners.robots_txt import Rules
from stages.settings import DownloadSettings

_ROOM = 16 << 10


class Robots(robots_txt.Asking):
    """Asks each host for its robots.txt before the first of its URLs; used on the loop alone."""

    def __init__(self, client: Client, told: DownloadSettings) -> None:
        """Know nothing."""
        super().__init__(told)
        self._client = client
        self._asked: dict[Origin, asyncio.Task[Rules | DropReason]] = {}

    async def check(self, url: Url) -> None:
        """Wait until it is known whether this URL may be fetched.

        Raises:
            Dropped: ROBOTS_TXT when it may not, or why the host's robots.txt could not be had.
        """
        if not self._told.respect_robots:
            return
        said = self._said.get(url.origin)
        if said is None:
            # Whoever waits may run out of time; the answer is still good for those after.
            said = await asyncio.shield(self._asked.get(url.origin) or self._start(url))
        robots_txt.check(said, url)

    async def close(self) -> None:
        """Give up what nobody waits for any more."""
        for task in self._asked.values():
            task.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)

    def _start(self, url: Url) -> "asyncio.Task[Rules | DropReason]":
        task = self._asked[url.origin] = asyncio.get_running_loop().create_task(self._ask(url))
        return task

    async def _ask(self, url: Url) -> Rules | DropReason:
        way = [url._replace(target=robots_txt.PATH)]
        try:
            async with asyncio.timeout(self._limit_s) as clock:
                said: Rules | DropReason = await self._persist(way, clock.when() or 0.0)
        except TimeoutError:
            said = DropReason.TIMEOUT
        except Dropped as failure:
            said = robots_txt.judge(failure.reason, len(way) - 1)
        finally:
            del self._asked[url.origin]
        self._said.put(url.origin, said)
        return said

    async def _persist(self, way: list[Url], deadline: float) -> Rules:
        now = asyncio.get_running_loop().time
        for attempt in count():
            del way[1:]
            try:
                return await self._parsed(await self._attempt(way))
            except Dropped as failure:
                pause = wait_s(failure, attempt, self._told, deadline - now())
            await asyncio.sleep(pause)
        raise AssertionError("count() does not end")

    async def _attempt(self, way: list[Url]) -> bytes:
        text = _Text()
        for hops in count():
            response = await self._client.get(way[-1])
            try:
                head = response.head
                if not check_status(head.status, head.retry_after):
                    await response.into(text)
                    break
                way.append(redirected(way[-1], head.location, hops, self._told))
            except _FullError:
                break
            finally:
                response.close()
        return bytes(text.data)

    async def _parsed(self, text: bytes) -> Rules:
        if len(text) < robots_txt.LARGE:
            return robots_txt.parse(text, self._name)
        return await asyncio.get_running_loop().run_in_executor(None, robots_txt.parse, text, self._name)


class _FullError(Exception):
    """As much was read as will be looked at."""


class _Text:
    """Takes the first bytes of a robots.txt."""

    promising = False

    def __init__(self) -> None:
        self.data = bytearray()
        self._room = bytearray(_ROOM)

    def announce(self, length: int | None) -> None:
        """The length does not matter."""

    def feed(self, chunk: bytes) -> None:
        """Take a chunk; raises _FullError when it is enough."""
        self.data += chunk
        if len(self.data) >= robots_txt.MOST_BYTES:
            raise _FullError

    def room(self) -> memoryview:
        """Where the next bytes may be written."""
        return memoryview(self._room)

    def took(self, count: int) -> None:
        """Take bytes from the room."""
        self.feed(bytes(self._room[:count]))
