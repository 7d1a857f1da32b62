"""An `urlopen` for hostile servers: checked addresses, bounded redirects, bytes and time."""

import http.client
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any, Self
from urllib.request import Request

from schemas.drops import DropReason
from stages.base import Dropped
from stages.fetch import address
from stages.fetch.address import Guard, Url
from stages.fetch.base import LOCAL_TROUBLE, check_head, user_agent
from stages.fetch.body import Body
from stages.fetch.http import resolve
from stages.settings import Settings

_CHUNK = 64 << 10
_REASONS: tuple[tuple[type[Exception], DropReason], ...] = (
    (TimeoutError, DropReason.TIMEOUT),
    (http.client.RemoteDisconnected, DropReason.CONNECTION_ERROR),
    (http.client.IncompleteRead, DropReason.INCOMPLETE_BODY),
    (http.client.InvalidURL, DropReason.BAD_URL),
    (http.client.HTTPException, DropReason.HTTP_ERROR),
    (OSError, DropReason.CONNECTION_ERROR),
)
"""What urllib and http.client raise -> reason; the first that fits."""


class Opener:
    """Opens one URL. What it raises is kept in `failure`, for callers that see no more of it than its text."""

    def __init__(
        self, settings: Settings, guard: Guard, deadline: float, may_ask: Callable[[Url], None] | None = None
    ) -> None:
        """Remember when all must be done, on the clock of `time.monotonic`.

        `may_ask` is called with each URL of a redirect, and raises `Dropped` when it must not be asked for.
        """
        self._settings = settings
        self._told = settings.download
        self._guard = guard
        self._deadline = deadline
        self._may_ask = may_ask
        self.failure: Dropped | None = None
        self.way: list[Url] = []
        """All URLs that were asked for."""

    def open(self, request: Request, timeout: float | None = None) -> "Response":
        """The response to `request` after its redirects; `timeout` is overruled by the deadline.

        Raises:
            Dropped: with the reason; its `read` does too.
        """
        with self.translated():
            url = address.parse(request.full_url)
            for hops in count():
                response = self.get(url)
                head = response.headers
                tags, later = head.get_all("X-Robots-Tag", []), head.get("Retry-After")
                try:
                    if not check_head(response.status, tags, later, self._told):
                        return Response(self, response)
                    url = address.redirected(url, head.get("Location"), hops, self._told)
                except Dropped:
                    response.close()
                    raise
                response.close()
                if self._may_ask is not None:
                    self._may_ask(url)
        raise AssertionError("count() does not end")

    def read(self, response: http.client.HTTPResponse) -> bytes:
        """The body of a response."""
        with self.translated():
            body = Body(self._settings)
            body.announce(response.length)
            try:
                while chunk := response.read(_CHUNK):
                    body.feed(chunk)
            except ConnectionError as error:
                raise Dropped(DropReason.INCOMPLETE_BODY) from error
            # http.client notices a short body only when asked for all of it at once.
            if response.length:
                raise Dropped(DropReason.INCOMPLETE_BODY)
            return bytes(body.finish())

    def get(self, url: Url) -> http.client.HTTPResponse:
        """The response to one request, to be closed; raises what http.client raises, and `Dropped`."""
        self.way.append(url)
        url = self._guard.route(url)
        connection = (_Tls if url.scheme == "https" else _Plain)(url, self._guard, self._deadline)
        try:
            headers = {"Host": url.authority, "User-Agent": user_agent(self._told), "Connection": "close"}
            connection.request("GET", url.target, headers=headers)
            return connection.getresponse()
        except BaseException:
            connection.close()
            raise
        finally:
            # The response holds a file of its own on the socket; with this one closed, closing that one ends it.
            if connection.sock is not None:
                connection.sock.close()

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn what http.client raises into `Dropped`."""
        try:
            try:
                yield
            except (OSError, http.client.HTTPException) as error:
                raise Dropped(_reason(error)) from error
        except Dropped as dropped:
            self.failure = dropped
            raise


def _reason(error: Exception) -> DropReason:
    if isinstance(error, OSError) and error.errno in LOCAL_TROUBLE:
        raise error
    return next(reason for kind, reason in _REASONS if isinstance(error, kind))


class Response:
    """As much of urllib's response as img2dataset uses."""

    def __init__(self, opener: Opener, response: http.client.HTTPResponse) -> None:
        """Wrap a response whose head was judged."""
        self._opener = opener
        self._response = response
        self.headers = response.headers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()

    def read(self) -> bytes:
        """The body; raises `Dropped` as `Opener.open` does."""
        return self._opener.read(self._response)


class _Deadline:
    """Mixed into a socket: its reads end at a moment, however slowly the bytes drip."""

    deadline: float

    def recv_into(self, *args: Any) -> int:
        self.settimeout(_left(self.deadline))  # type: ignore[attr-defined]
        got: int = super().recv_into(*args)  # type: ignore[misc]
        return got


class _Socket(_Deadline, socket.socket):
    """A plain socket with a deadline."""


class _TlsSocket(_Deadline, ssl.SSLSocket):
    """A TLS socket with a deadline."""


class _Plain(http.client.HTTPConnection):
    """An http connection to an address that was checked."""

    def __init__(self, url: Url, guard: Guard, deadline: float) -> None:
        super().__init__(url.host, url.port)
        self._guard = guard
        self._deadline = deadline

    def connect(self) -> None:
        self.sock = _connect(self.host, self.port, self._guard, self._deadline)


class _Tls(_Plain):
    """An https connection to an address that was checked."""

    def connect(self) -> None:
        super().connect()
        secured = _context().wrap_socket(self.sock, server_hostname=self.host)
        secured.deadline = self._deadline  # type: ignore[attr-defined]
        self.sock = secured


@cache
def _context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.sslsocket_class = _TlsSocket
    return context


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return left


def _connect(host: str, port: int, guard: Guard, deadline: float) -> socket.socket:
    """A socket to the first address of `host` that is allowed and answers: the very address that was checked."""
    places = resolve.permitted(resolve.look_up(host), port, guard)
    for last, place in enumerate(places, start=1 - len(places)):
        made = _Socket(place.family, socket.SOCK_STREAM)
        made.deadline = deadline
        try:
            # An address that does not answer leaves time for those after it.
            made.settimeout(_left(deadline) * (1.0 if last == 0 else resolve.SHARE_OF_DEADLINE))
            made.connect((place.address, port))
            return made
        except OSError:
            made.close()
            if last == 0:
                raise
    raise AssertionError("the last address either answered or raised")
