"""robots.txt for the img2dataset engine: fetched once per host, while the other threads of that host wait."""

import time
from http.client import HTTPResponse
from itertools import count
from threading import BoundedSemaphore

from schemas.drops import DropReason
from stages.base import Dropped
from stages.fetch.address import Guard, Url, redirected
from stages.fetch.base import check_status, wait_s
from stages.fetch.manners import robots_txt
from stages.fetch.manners.robots_txt import Rules
from stages.fetch.named import Named
from stages.fetch.opener import Opener
from stages.settings import Settings

_CHUNK = 64 << 10


class Robots(robots_txt.Asking):
    """Asks each host for its robots.txt before the first of its URLs; safe for threads."""

    def __init__(self, settings: Settings, guard: Guard) -> None:
        super().__init__(settings.download)
        self._settings, self._guard = settings, guard
        self._one_asks = Named(BoundedSemaphore)

    def check(self, url: Url) -> None:
        """Wait until it is known whether this URL may be fetched.

        Raises:
            Dropped: ROBOTS_TXT when it may not, or why the host's robots.txt could not be had.
        """
        if not self._told.respect_robots:
            return
        said = self._said.get(url.origin)
        if said is None:
            with self._one_asks.of(url.origin):
                said = self._said.get(url.origin)
                if said is None:
                    said = self._ask(url)
                    self._said.put(url.origin, said)
        robots_txt.check(said, url)

    def _ask(self, url: Url) -> Rules | DropReason:
        deadline = time.monotonic() + self._limit_s
        for attempt in count():
            opener = Opener(self._settings, self._guard, deadline)
            try:
                return self._attempt(opener, url._replace(target=robots_txt.PATH))
            except Dropped as failure:
                try:
                    pause = wait_s(failure, attempt, self._told, deadline - time.monotonic())
                except Dropped:
                    return robots_txt.judge(failure.reason, len(opener.way) - 1)
            time.sleep(pause)
        raise AssertionError("count() does not end")

    def _attempt(self, opener: Opener, url: Url) -> Rules:
        with opener.translated():
            for hops in count():
                with opener.get(url) as response:
                    if not check_status(response.status, response.headers.get("Retry-After")):
                        return robots_txt.parse(_text(response), self._name)
                    url = redirected(url, response.headers.get("Location"), hops, self._told)
        raise AssertionError("count() does not end")


def _text(response: HTTPResponse) -> bytes:
    text = bytearray()
    while len(text) < robots_txt.MOST_BYTES and (chunk := response.read(_CHUNK)):
        text += chunk
    if response.length and len(text) < robots_txt.MOST_BYTES:
        raise Dropped(DropReason.INCOMPLETE_BODY)
    return bytes(text)
