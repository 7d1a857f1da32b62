"""The native engine: asynchronous, one per process, stops reading as soon as an image cannot be kept."""

import asyncio
import weakref
from collections.abc import Sequence
from itertools import count

from schemas.drops import DropReason
from stages.base import Dropped
from stages.fetch import address
from stages.fetch.address import Guard, Url
from stages.fetch.base import Outcome, bare, check_head, wait_s
from stages.fetch.body import Body
from stages.fetch.http.client import Client
from stages.fetch.loop import LoopThread
from stages.fetch.manners.hosts import Hosts
from stages.fetch.manners.refusals import Refusals
from stages.fetch.manners.robots_asked import Robots
from stages.fetch.named import Named
from stages.runtime import Runtime
from stages.settings import Settings

_RESOLVERS = 64


class Native:
    """Fetches on a loop of its own; `fetch` may be called from several threads at once."""

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        """Start the loop."""
        self._refusals = Refusals(runtime.refusals)
        self._loop = LoopThread(min(_RESOLVERS, settings.download.concurrency))
        self._fetcher = self._loop.run(_made(settings, runtime, self._refusals))
        self._finalizer = weakref.finalize(self, _close, self._loop, self._fetcher, self._refusals)

    def fetch(self, urls: Sequence[str | None]) -> list[Outcome]:
        """The outcome of each URL, in their order."""
        self._refusals.refresh()
        return self._loop.run(self._fetcher.fetch(urls))

    def close(self) -> None:
        """Close all connections and stop the loop."""
        self._finalizer()


async def _made(settings: Settings, runtime: Runtime, refusals: Refusals) -> "_Fetcher":
    return _Fetcher(settings, runtime, refusals)


def _close(loop: LoopThread, fetcher: "_Fetcher", refusals: Refusals) -> None:
    loop.run(fetcher.close())
    loop.stop()
    refusals.close()


class _Fetcher:
    """The way of each URL from its text to its outcome. Made and used on the loop."""

    def __init__(self, settings: Settings, runtime: Runtime, refusals: Refusals) -> None:
        self._settings = settings
        self._told = settings.download
        self._refusals = refusals
        self._hosts = Hosts(self._told)
        # At most `per_host` at a time per host, so that one slow host cannot hold all.
        self._turns = Named[asyncio.Semaphore](lambda: asyncio.Semaphore(self._told.per_host))
        self._all_turns = asyncio.Semaphore(self._told.concurrency)
        self._client = Client(self._told, Guard(self._told, runtime.sample_port))
        self._robots = Robots(self._client, self._told)

    async def close(self) -> None:
        await self._robots.close()
        await self._client.close()

    async def fetch(self, urls: Sequence[str | None]) -> list[Outcome]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._outcome(url)) for url in urls]
        return [task.result() for task in tasks]

    async def _outcome(self, text: str | None) -> Outcome:
        way: list[Url] = []
        try:
            return await self._fetched(address.parse(text), way)
        except Dropped as dropped:
            self._refusals.add(way, dropped.reason)
            return bare(dropped)

    async def _fetched(self, url: Url, way: list[Url]) -> bytearray:
        self._refusals.check(url)
        while True:
            async with self._turns.of(url.host), self._all_turns:
                # Only now: while it waited for its turn, those before it may have found the host down.
                pause = self._hosts.wait_s(url.origin)
                if not pause:
                    return await self._in_turn(url, way)
            await asyncio.sleep(pause)

    async def _in_turn(self, url: Url, way: list[Url]) -> bytearray:
        await self._robots.check(url)
        try:
            # The deadline starts with the URL's turn: waiting in our own queue is not the server's fault.
            async with asyncio.timeout(self._told.timeout_s) as clock:
                return await self._persist(url, way, clock.when() or 0.0)
        except TimeoutError:
            raise self._seen(way, Dropped(DropReason.TIMEOUT)) from None

    async def _persist(self, url: Url, way: list[Url], deadline: float) -> bytearray:
        now = asyncio.get_running_loop().time
        for attempt in count():
            try:
                return await self._attempt(url, way)
            except Dropped as failure:
                pause = wait_s(self._seen(way, failure), attempt, self._told, deadline - now())
            await asyncio.sleep(pause)
        raise AssertionError("count() does not end")

    def _seen(self, way: list[Url], failure: Dropped) -> Dropped:
        self._hosts.saw(way[-1].origin, failure)
        return failure

    async def _attempt(self, url: Url, way: list[Url]) -> bytearray:
        way[:] = [url]
        for hops in count():
            response = await self._client.get(url)
            try:
                head = response.head
                if not check_head(head.status, head.robots_tags, head.retry_after, self._told):
                    body = Body(self._settings)
                    await response.into(body)
                    self._hosts.saw(url.origin, None)
                    return body.finish()
                url = address.redirected(url, head.location, hops, self._told)
            finally:
                response.close()
            way.append(url)
            await self._hop(url)
        raise AssertionError("count() does not end")

    async def _hop(self, url: Url) -> None:
        """What holds for the first URL holds for where it redirects to."""
        self._refusals.check(url)
        while pause := self._hosts.wait_s(url.origin):
            await asyncio.sleep(pause)
        await self._robots.check(url)
