"""The native engine: asynchronous, one session per process, stops reading as soon as an image cannot be kept."""

import asyncio
import errno
import socket
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address
from itertools import count
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from schemas.drops import DropReason
from stages.base import Dropped
from stages.fetch import address
from stages.fetch.base import LOCAL_TROUBLE, Outcome, bare, check_head, user_agent, wait_s
from stages.fetch.body import Body
from stages.fetch.loop import LoopThread
from stages.settings import DownloadSettings, Settings

_RESOLVERS = 64
_DNS_CACHE_S = 300
_DNS_CACHE_HOSTS = 10_000
_IDLE_S = 1.0
"""LAION's hosts are rarely asked twice in a row, and each idle connection costs a file descriptor."""
_FIRST_WINDOW = 16 << 10
"""Receive buffer until the header of the image is seen, bytes: all that a server can push at us in vain."""
_WINDOW = 1 << 20
"""Receive buffer from then on, bytes: 5 MB/s from the other side of the globe."""

_REASONS: tuple[tuple[type[Exception], DropReason], ...] = (
    (TimeoutError, DropReason.TIMEOUT),
    (aiohttp.ClientConnectorDNSError, DropReason.DNS_ERROR),
    (aiohttp.InvalidURL, DropReason.BAD_URL),
    (aiohttp.ClientResponseError, DropReason.HTTP_ERROR),
    (aiohttp.http_exceptions.ContentEncodingError, DropReason.HTTP_ERROR),
    (aiohttp.ClientPayloadError, DropReason.INCOMPLETE_BODY),
    (aiohttp.ClientConnectionError, DropReason.CONNECTION_ERROR),
    (OSError, DropReason.CONNECTION_ERROR),
)
"""What the client raises -> reason; the first that fits."""


class Native:
    """Fetches with aiohttp on a loop of its own; `fetch` may be called from several threads at once."""

    def __init__(self, settings: Settings) -> None:
        """Start the loop and open the session."""
        self._loop = LoopThread(min(_RESOLVERS, settings.download.concurrency))
        self._client = self._loop.run(_open(settings))
        self._finalizer = weakref.finalize(self, _close, self._loop, self._client)

    def fetch(self, urls: Sequence[str | None]) -> list[Outcome]:
        """The outcome of each URL, in their order."""
        return self._loop.run(self._client.fetch(urls))

    def close(self) -> None:
        """Close the session and stop the loop."""
        self._finalizer()


async def _open(settings: Settings) -> "_Client":
    return _Client(settings)


def _close(loop: LoopThread, client: "_Client") -> None:
    loop.run(client.close())
    loop.stop()


class _Client:
    """The session, and the way of one URL from its text to its outcome. Made and used on the loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._told: DownloadSettings = settings.download
        self._guard = address.Guard(self._told)
        self._turns = _Turns(self._told.concurrency, self._told.per_host)
        self._session = aiohttp.ClientSession(
            connector=_connector(self._told, self._guard),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": user_agent(self._told), "Accept-Encoding": "identity"},
            # The deadline is ours, over all hops and attempts.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            trust_env=False,
        )
        # aiohttp would repeat each broken connection once more, behind the back of download.retries.
        self._session._retry_connection = False

    async def close(self) -> None:
        await self._session.close()

    async def fetch(self, urls: Sequence[str | None]) -> list[Outcome]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._outcome(url)) for url in urls]
        return [task.result() for task in tasks]

    async def _outcome(self, text: str | None) -> Outcome:
        try:
            url = address.parse(text)
            # The deadline starts with the URL's turn: waiting in our own queue is not the server's fault.
            async with self._turns.turn(url.raw_host or ""), asyncio.timeout(self._told.timeout_s) as clock:
                return await self._persist(url, clock.when() or 0.0)
        except Dropped as dropped:
            return bare(dropped)
        except TimeoutError:
            return Dropped(DropReason.TIMEOUT)

    async def _persist(self, url: URL, deadline: float) -> bytes:
        now = asyncio.get_running_loop().time
        for attempt in count():
            try:
                return await self._attempt(url)
            except Dropped as failure:
                pause = wait_s(failure, attempt, self._told, deadline - now())
            await asyncio.sleep(pause)
        raise AssertionError("count() does not end")

    async def _attempt(self, url: URL) -> bytes:
        try:
            return await self._follow(url)
        except (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError) as error:
            raise Dropped(_reason(error)) from error

    async def _follow(self, url: URL) -> bytes:
        for hops in count():
            async with self._session.get(self._guard.route(url), allow_redirects=False) as response:
                head = response.headers
                tags, later = head.getall("X-Robots-Tag", ()), head.get("Retry-After")
                if not check_head(response.status, tags, later, self._told):
                    return await self._body(response)
                url = address.redirected(url, head.get("Location"), hops, self._told)
        raise AssertionError("count() does not end")

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        body = Body(self._settings)
        body.announce(response.content_length)
        narrow = True
        while chunk := await response.content.readany():
            body.feed(chunk)
            if narrow and body.promising:
                narrow = _widen(response)
        return body.finish()


def _widen(response: aiohttp.ClientResponse) -> bool:
    link = response.connection and response.connection.transport
    if link is not None:
        link.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WINDOW)
    return False


def _reason(error: Exception) -> DropReason:
    if isinstance(error, OSError) and error.errno in LOCAL_TROUBLE:
        raise error
    # aiohttp wraps what went wrong with a body in one exception; only its cause tells a bad coding from a short body.
    culprit = error.__cause__ if isinstance(error.__cause__, aiohttp.http_exceptions.ContentEncodingError) else error
    return next(reason for kind, reason in _REASONS if isinstance(culprit, kind))


class _Turns:
    """Who may connect now: at most `per_host` at a time per host, so that one slow host cannot hold all `total`."""

    def __init__(self, total: int, per_host: int) -> None:
        self._total = asyncio.Semaphore(total)
        self._per_host = per_host
        self._hosts: weakref.WeakValueDictionary[str, asyncio.Semaphore] = weakref.WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, host: str) -> AsyncIterator[None]:
        gate = self._hosts.get(host)
        if gate is None:
            gate = self._hosts[host] = asyncio.Semaphore(self._per_host)
        async with gate, self._total:
            yield


def _connector(told: DownloadSettings, guard: address.Guard) -> aiohttp.TCPConnector:
    def make_socket(info: tuple[Any, ...]) -> socket.socket:
        family, kind, proto, _, place = info
        # The last lock: no socket is made for an address that was not checked, whatever way led here.
        guard.check(place[0], place[1])
        made = socket.socket(family, kind, proto)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _FIRST_WINDOW)
        return made

    return aiohttp.TCPConnector(
        limit=told.concurrency,
        limit_per_host=told.per_host,
        resolver=_Resolver(guard),
        ttl_dns_cache=_DNS_CACHE_S,
        dns_cache_max_size=_DNS_CACHE_HOSTS,
        keepalive_timeout=_IDLE_S,
        socket_factory=make_socket,
    )


class _Resolver(AbstractResolver):
    """The system's resolver, less the addresses that are refused."""

    def __init__(self, guard: address.Guard) -> None:
        self._guard = guard
        self._system = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        try:
            found = await self._system.resolve(host, port, family)
        except UnicodeError as error:  # a label that is empty or too long
            raise OSError(errno.EINVAL, "not a host name") from error
        allowed = [place for place in found if self._guard.allows(ip_address(place["host"]), place["port"])]
        if found and not allowed:
            raise Dropped(DropReason.FORBIDDEN_ADDRESS)
        return allowed

    async def close(self) -> None:
        """Nothing to let go of."""
