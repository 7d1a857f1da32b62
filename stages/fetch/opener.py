"""An `urlopen` for hostile servers: checked addresses, bounded redirects, bytes and time."""

import http.client
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from ipaddress import ip_address
from itertools import count
from typing import Any
from urllib.error import URLError
from urllib.request import AbstractHTTPHandler, Request

from yarl import URL

from schemas.drops import DropReason
from stages.base import Dropped
from stages.fetch import address
from stages.fetch.base import LOCAL_TROUBLE, check_head, user_agent
from stages.fetch.body import Body
from stages.settings import Settings

_CHUNK = 64 << 10
_REASONS: tuple[tuple[type[Exception], DropReason], ...] = (
    (TimeoutError, DropReason.TIMEOUT),
    (socket.gaierror, DropReason.DNS_ERROR),
    (http.client.RemoteDisconnected, DropReason.CONNECTION_ERROR),
    (http.client.IncompleteRead, DropReason.INCOMPLETE_BODY),
    (http.client.InvalidURL, DropReason.BAD_URL),
    (http.client.HTTPException, DropReason.HTTP_ERROR),
    (OSError, DropReason.CONNECTION_ERROR),
)
"""What urllib and http.client raise -> reason; the first that fits."""


class Opener:
    """Opens one URL. What it raises is kept in `failure`, for callers that see no more of it than its text."""

    def __init__(self, settings: Settings, deadline: float) -> None:
        """Remember when all must be done, on the clock of `time.monotonic`."""
        self._settings = settings
        self._told = settings.download
        self._guard = address.Guard(self._told)
        self._deadline = deadline
        self.failure: Dropped | None = None

    def open(self, request: Request, timeout: float | None = None) -> "_Response":
        """The response to `request` after its redirects; `timeout` is overruled by the deadline.

        Raises:
            Dropped: with the reason; its `read` does too.
        """
        with self._translated():
            url = address.parse(request.full_url)
            for hops in count():
                response = self._get(self._guard.route(url))
                head = response.headers
                tags, later = head.get_all("X-Robots-Tag", []), head.get("Retry-After")
                with _closed_on_error(response):
                    if not check_head(response.status, tags, later, self._told):
                        return _Response(self, response)
                    url = address.redirected(url, head, hops, self._told)
                response.close()
        raise AssertionError("count() does not end")

    def read(self, response: http.client.HTTPResponse) -> bytes:
        """The body of a response."""
        with self._translated():
            body = Body(self._settings)
            body.announce(response.length)
            while chunk := response.read(_CHUNK):
                body.feed(chunk)
            # http.client notices a short body only when asked for all of it at once.
            if response.length:
                raise Dropped(DropReason.INCOMPLETE_BODY)
            return body.finish()

    def _get(self, url: URL) -> http.client.HTTPResponse:
        request = Request(str(url), headers={"User-Agent": user_agent(self._told)})  # noqa: S310 (address.parse)
        request.timeout = max(0.001, self._deadline - time.monotonic())
        secure: dict[str, Any] = {"context": _tls()} if url.scheme == "https" else {}
        handler = AbstractHTTPHandler()
        handler.parent = _NoHeaders()
        kind = _HTTPS if url.scheme == "https" else _HTTP
        response: http.client.HTTPResponse = handler.do_open(
            kind, handler.do_request_(request), guard=self._guard, deadline=self._deadline, **secure
        )
        return response

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            try:
                yield
            except (OSError, http.client.HTTPException) as error:
                raise Dropped(_reason(error)) from error
        except Dropped as dropped:
            self.failure = dropped
            raise
