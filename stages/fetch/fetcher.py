"""From a URL to its outcome, by the manners of the house: robots.txt, refusals, hosts, redirects, retries, deadline."""

import asyncio
from functools import partial

from schemas.drops import Dropped, DropReason
from schemas.urls import Url
from stages.fetch.address import Guard, parse, redirected
from stages.fetch.ahead import Pending, Slots
from stages.fetch.answer import bare, check_status, opted_out
from stages.fetch.body import Body
from stages.fetch.engine import Outcome, Stopwatch
from stages.fetch.http.client import Client
from stages.fetch.http.deadline import Deadline
from stages.fetch.manners.hosts import Hosts
from stages.fetch.manners.refusals import Refusals
from stages.fetch.manners.robots import Robots
from stages.runtime import Runtime
from stages.settings import Settings


class Fetcher:
    """What all URLs of a process share. Made and used on the loop."""

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self._settings = settings
        self._download = settings.download
        self.refusals = Refusals(runtime.refusals)
        self._slots = Slots(settings.download.concurrency)
        self._hosts = Hosts(settings.download)
        self.stopwatch = Stopwatch()
        self._client = Client(settings.download, Guard(settings.download, runtime.sample_port), self.stopwatch)
        self._robots = Robots(self._client, self._hosts, settings.download)

    async def close(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()
        self.refusals.close()

    async def outcome(self, pending: Pending) -> Outcome:
        trail: list[Url] = []
        """The URL, and where its redirects led."""
        deadline = Deadline(self._download.timeout_s)
        try:
            trail.append(parse(pending.url))
            return await deadline.persist(partial(self._attempt, pending, trail, deadline), self._download)
        except Dropped as dropped:
            self.refusals.add(trail, dropped.reason)
            return bare(dropped)
        finally:
            if deadline.left_s < self._download.timeout_s:  # else nobody was waited for
                self.stopwatch.add(trail[-1].host, self._download.timeout_s - deadline.left_s)

    async def _attempt(self, pending: Pending, trail: list[Url], deadline: Deadline) -> bytes:
        """Follow a URL's redirects to its image. What holds for the first URL holds for each that follows."""
        del trail[1:]
        while True:
            url = trail[-1]
            self.refusals.check(url)
            await self._robots.check(url)
            # Nobody waits for a second host while holding a connection of the first: hosts that redirect to each other
            # would stop each other.
            result = None
            while result is None:
                await pending.ahead.room(pending.index)
                async with self._hosts.connection(url):
                    result = await self._exchange(pending, url, len(trail) - 1, deadline)
            if isinstance(result, bytes):
                return result
            trail.append(result)

    async def _exchange(self, pending: Pending, url: Url, hops: int, deadline: Deadline) -> bytes | Url | None:
        """An image, or where a redirect leads, or None where the stream has no room for it any more.

        The deadline counts while a server is waited for, not while this row waits for its turn.
        """
        try:
            async with deadline.running():
                await self._client.look_up(url)
            async with self._slots.held(pending.index):
                if not pending.ahead.may_begin(pending.index):
                    return None
                async with deadline.running(), self._client.get(url) as answer:
                    # the wish of a site counts on every hop of a redirect chain
                    is_heeded = self._download.respect_opt_out and answer.status < 400
                    if is_heeded and opted_out(answer.headers.getall("X-Robots-Tag", ()), self._download.user_agent):
                        raise Dropped(DropReason.OPTED_OUT)
                    if check_status(answer.status, answer.headers.get("Retry-After")):
                        result: bytes | Url = redirected(url, answer.location, hops, self._download)
                    else:
                        body = Body(self._settings)
                        body.announce(answer.content_length)
                        async for piece in answer.pieces(self._download.max_bytes):
                            body.feed(piece)
                            pending.weigh(len(body))
                        result = body.finish()
        except Dropped as failure:
            self._hosts.record(url.origin, failure)
            pending.weigh(0)
            raise
        self._hosts.record(url.origin, None)
        return result
