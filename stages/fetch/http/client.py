"""The native engine's HTTP client: GET requests over connections to addresses that were checked."""

from functools import partial

from schemas.drops import DropReason
from stages.base import Dropped
from stages.fetch.address import Guard, Url
from stages.fetch.base import LOCAL_TROUBLE, user_agent
from stages.fetch.http import http1, link, resolve
from stages.fetch.http.link import Link
from stages.fetch.http.pool import Pool
from stages.fetch.http.response import Response
from stages.settings import DownloadSettings

_SWITCHING_PROTOCOLS = 101


class Client:
    """Sends requests; made and used on the loop. Deadlines are the caller's."""

    def __init__(self, told: DownloadSettings, guard: Guard) -> None:
        self._told = told
        self._guard = guard
        self._agent = user_agent(told)
        self._resolver = resolve.Resolver()
        self._pool = Pool(told.concurrency)

    async def close(self) -> None:
        """Close the connections that wait, and give up the look-ups that nobody waits for any more."""
        self._pool.close()
        await self._resolver.close()

    async def get(self, url: Url) -> Response:
        """The answer to a GET request, as soon as its head is there; to be closed.

        Raises:
            Dropped: FORBIDDEN_ADDRESS, DNS_ERROR, CONNECTION_ERROR or HTTP_ERROR.
            OSError: for this machine's own trouble.
        """
        url = self._guard.route(url)
        try:
            waiting = self._pool.take(url.origin)
            if waiting is not None:
                try:
                    return await self._exchange(waiting, url)
                except _StaleError:
                    pass  # the host closed it before it saw the request: that says nothing of the host
            return await self._exchange(await self._connected(url), url)
        except OSError as error:
            if error.errno in LOCAL_TROUBLE:
                raise
            raise Dropped(DropReason.CONNECTION_ERROR) from error

    async def _connected(self, url: Url) -> Link:
        places = resolve.permitted(await self._resolver.places(url.host), url.port, self._guard)
        tls_host = url.host if url.scheme == "https" else None
        return await link.connect(places, url.port, tls_host, resolve.SHARE_OF_DEADLINE * self._told.timeout_s)

    async def _exchange(self, over: Link, url: Url) -> Response:
        try:
            first = await self._asked(over, url)
            head, rest = await self._head(over, first)
        except BaseException:
            over.close()
            raise
        return Response(head, rest, over, self._told.max_bytes, partial(self._pool.put, url.origin))

    async def _asked(self, over: Link, url: Url) -> bytes:
        """Send the request; the first bytes of the answer."""
        try:
            await over.send(http1.request(url, self._agent))
            return _some(over.space, await over.answer(over.space))
        except OSError as error:
            if over.used:
                raise _StaleError from error
            raise

    async def _head(self, over: Link, data: bytes) -> tuple[http1.Head, bytes]:
        seen = 0
        for _ in range(1 + http1.MOST_INTERIM):
            while (end := http1.find_end(data, seen)) is None:
                seen = len(data)
                data += _some(over.space, await over.receive(over.space))
            head, data, seen = http1.parse_head(data[:end]), data[end:], 0
            if head.status >= 200:
                return head, data
            if head.status == _SWITCHING_PROTOCOLS:
                break
        raise Dropped(DropReason.HTTP_ERROR)


def _some(space: memoryview, count: int) -> bytes:
    if not count:
        raise ConnectionResetError("the connection ended before the answer's head")
    return bytes(space[:count])


class _StaleError(ConnectionError):
    """A connection that had waited was closed by its host."""
