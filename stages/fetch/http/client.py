"""The one HTTP client: GET requests by aiohttp, over connections to addresses that were checked."""

import asyncio
import errno
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from typing import cast
from urllib.parse import quote

import aiohttp
from yarl import URL

from schemas.drops import Dropped, DropReason
from schemas.urls import Url
from stages.fetch.address import Guard
from stages.fetch.answer import LOCAL_TROUBLE, user_agent
from stages.fetch.engine import Stopwatch
from stages.fetch.http.connections import Connector, is_reused
from stages.fetch.http.inflate import LARGE_PIECE, inflated
from stages.fetch.http.resolve import Resolver
from stages.settings import DownloadSettings

_IDLE_S = 5.0
"""Over a distance a new connection costs several round trips until it is fast, and an idle one a file descriptor."""
_READ_AHEAD = 64 << 10
"""Bytes that are read from the network before they are wanted; twice of it stops the reading."""
_LONGEST_LINE, _MOST_FIELDS = 16 << 10, 256
_TINY, _MOST_TINY, _GATHER_S = 512, 32, 0.01
"""A server that sends single bytes as fast as it can costs us a wake-up each: from then on they are let to gather."""
_ASCII = "".join(map(chr, range(0x21, 0x7F)))


@cache
def tls_context() -> ssl.SSLContext:
    """By the system's certificates; one a process, since it reads them all: OpenSSL lets threads share it."""
    return ssl.create_default_context()


class Client:
    """Sends requests; made and used on the loop. Deadlines, and how many at a time, are the caller's."""

    def __init__(self, settings: DownloadSettings, guard: Guard, stopwatch: Stopwatch) -> None:
        self._guard = guard
        self._resolver = Resolver(self._guard, stopwatch)
        connector = Connector(
            _most_waiting(settings.concurrency),
            limit=0,
            resolver=self._resolver,
            use_dns_cache=False,
            ssl=tls_context(),
            keepalive_timeout=_IDLE_S,
            socket_factory=self._socket,
        )
        # Neither trust_env nor cookies: what was not configured here must not slip in from the environment.
        self._session = aiohttp.ClientSession(
            connector=connector,
            response_class=Answer,
            headers={"User-Agent": user_agent(settings), "Accept": "*/*", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            auto_decompress=False,
            read_bufsize=_READ_AHEAD,
            max_line_size=_LONGEST_LINE,
            max_field_size=_LONGEST_LINE,
            max_headers=_MOST_FIELDS,
        )
        self._session._retry_connection = False  # it would repeat requests over new connections too

    async def close(self) -> None:
        await self._session.close()

    async def look_up(self, url: Url) -> None:
        """Learn the addresses of a URL's host, so that a request for it need not wait for them."""
        url = self._guard.route(url)
        await self._resolver.resolve(url.host, url.port)

    @asynccontextmanager
    async def get(self, url: Url) -> AsyncIterator["Answer"]:
        """The answer to a GET request, as soon as its head is there. Redirects are not followed.

        Raises:
            Dropped: FORBIDDEN_ADDRESS, DNS_ERROR, CONNECTION_ERROR, HTTP_ERROR, BAD_URL.
        """
        url = self._guard.route(url)
        with _reasons(DropReason.CONNECTION_ERROR):
            answer = None
            while answer is None:
                is_reused.set(False)
                try:
                    answer = await self._session.get(URL(str(url), encoded=True), allow_redirects=False)
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                    if not is_reused.get():
                        raise
                    # A host closed a waiting connection before the request came: that says nothing of the host.
        try:
            yield cast(Answer, answer)
        finally:
            answer.release()

    def _socket(self, address: tuple[int, int, int, str, tuple[str, int]]) -> socket.socket:
        """The last lock: no socket is made for an address that may not be connected to."""
        family, kind, protocol, _, (host, port, *_) = address
        if not self._guard.allows(host, port):
            raise PermissionError(errno.EACCES, "an address that must not be connected to")
        return socket.socket(family, kind, protocol)


def _most_waiting(at_a_time: int) -> int:
    """How many connections may wait for a further request, given how many are in use: what this process may open.

    Images of one host seldom come one right after the other, so that many waiting connections pay.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 6 * at_a_time + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return 4 * at_a_time if soft == resource.RLIM_INFINITY else max(0, min(4 * at_a_time, soft - 2 * at_a_time - 512))


class Answer(aiohttp.ClientResponse):
    """The head of an answer, and the body to come."""

    @property
    def location(self) -> str | None:
        """Where it redirects to; bytes beyond ASCII are percent-encoded as they came, whatever encoding they are in."""
        for name, value in self.raw_headers:
            if name.lower() == b"location":
                return quote(value.strip(), safe=_ASCII)
        return None

    async def pieces(self, max_bytes: int) -> AsyncIterator[bytes]:
        """The body, its codings undone.

        Raises:
            Dropped: INCOMPLETE_BODY, HTTP_ERROR, or TOO_MANY_BYTES where more came than may be kept.
        """
        unpacker = inflated(self.headers.get("Content-Encoding", ""))
        size = tiny = 0
        while True:
            with _reasons(DropReason.INCOMPLETE_BODY):
                piece = await self.content.readany()
            if not piece:
                break
            size += len(piece)
            if size > max_bytes:
                raise Dropped(DropReason.TOO_MANY_BYTES)
            if unpacker is None:
                yield piece
            else:
                for part in unpacker.feed(piece):
                    yield part
                    if len(part) >= LARGE_PIECE:
                        await asyncio.sleep(0)  # a bomb unfolds in the turns of others
            tiny = max(0, tiny + (1 if len(piece) < _TINY else -1))
            transport = self.connection and self.connection.transport
            if tiny > _MOST_TINY and isinstance(transport, asyncio.ReadTransport):
                transport.pause_reading()
                await asyncio.sleep(_GATHER_S)
                transport.resume_reading()
        if unpacker is not None and not unpacker.is_done:
            raise Dropped(DropReason.INCOMPLETE_BODY)


@contextmanager
def _reasons(broken: DropReason) -> Iterator[None]:
    """Turn aiohttp's errors into `Dropped`; `broken` is the reason where the connection breaks."""
    try:
        yield
    except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError, OSError) as error:
        if isinstance(error, OSError) and error.errno in LOCAL_TROUBLE:
            raise
        raise Dropped(broken) from error
    except aiohttp.InvalidURL as error:
        raise Dropped(DropReason.BAD_URL) from error
    except aiohttp.ClientError as error:
        raise Dropped(DropReason.HTTP_ERROR) from error
