"""How many connections a host gets, and which are left alone for a while: who wants it, and who fails again and again.

What a row of such a host gets depends on when its turn comes. All reasons that are given here are among
`SECOND_CHANCE`: a later pass fetches those rows.
"""

import asyncio
import time
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from schemas.drops import Dropped, DropReason
from schemas.urls import Origin, Url
from stages.fetch.answer import HOST_TROUBLE, LONGEST_REST_S, rest_s
from stages.settings import DownloadSettings

_FIRST_REST_S = 10.0
_PAUSE_S = 0.25
"""After each deadline that passed: others that pass at the same time are counted before yet another row begins."""
_LOOK_AGAIN_S = 0.05
"""How often a row looks whether the probe before it has come back."""
_MOST_HOSTS = 20_000


@dataclass
class _Host:
    failures: int = 0
    """In a row."""
    pause_until: float = 0.0
    rest_s: float = 0.0
    """The last rest; the next one is twice as long."""
    until: float = 0.0
    """Rests until then."""
    reason: DropReason = DropReason.HOST_DOWN
    """What its rows get meanwhile."""
    probe_until: float = 0.0
    """One row is trying whether it is up again; if it does not come back, another may try from then on."""


class Hosts:
    """The health of all hosts that this process fetches from, and their connections; used on the loop alone.

    After `download.host_failures` failures in a row a host rests, each time twice as long. Then one row tries it, while
    the others wait for what comes of it.
    """

    def __init__(self, settings: DownloadSettings) -> None:
        self._settings = settings
        self._known: OrderedDict[Origin, _Host] = OrderedDict()
        self._connections: weakref.WeakValueDictionary[str, asyncio.Semaphore] = weakref.WeakValueDictionary()

    def connections(self, host: str) -> asyncio.Semaphore:
        """The `download.per_host` connections to a host; who holds one must not wait for another."""
        known = self._connections.get(host)
        if known is None:
            known = self._connections[host] = asyncio.Semaphore(self._settings.per_host)
        return known

    @asynccontextmanager
    async def connection(self, url: Url) -> AsyncIterator[None]:
        """Wait until a URL's host may be sent a request, and hold one of its connections."""
        while True:
            async with self.connections(url.host):
                # Only now: while this row waited for its turn, those before it may have brought the host down.
                pause = self.wait_s(url.origin)
                if not pause:
                    yield
                    return
            await asyncio.sleep(pause)

    def wait_s(self, origin: Origin) -> float:
        """How long to wait before a request to this host, and then to call this again; 0 for: go.

        Raises:
            Dropped: when it rests for longer than a row may wait.
        """
        host, now = self._known.get(origin), time.monotonic()
        if host is None:
            return 0.0
        if now < host.until:
            if host.reason is DropReason.HOST_DOWN or host.until - now > self._settings.timeout_s:
                raise Dropped(host.reason)
            return host.until - now
        if not self._is_down(host):
            return max(0.0, host.pause_until - now) if self._settings.host_failures else 0.0
        if now < host.probe_until:
            return _LOOK_AGAIN_S
        host.probe_until = now + self._settings.timeout_s
        return 0.0

    def record(self, origin: Origin, failure: Dropped | None) -> None:
        """Take note of how a request to a host ended; None for well."""
        now = time.monotonic()
        if failure is None or failure.reason not in HOST_TROUBLE:
            host = self._known.pop(origin, None)
            if host is not None and now < host.until and host.reason is not DropReason.HOST_DOWN:
                # It answers, but it wants rest: requests that were out already do not end that.
                self._known[origin] = _Host(until=host.until, reason=host.reason)
            return
        host = self._known.setdefault(origin, _Host())
        self._known.move_to_end(origin)
        if len(self._known) > _MOST_HOSTS:
            self._known.popitem(last=False)
        host.failures += 1
        host.probe_until = 0.0
        if failure.reason is DropReason.TIMEOUT:
            host.pause_until = now + _PAUSE_S
        if wanted_s := rest_s(failure):
            host.until = max(host.until, now + wanted_s)
            host.reason = failure.reason
        elif self._is_down(host) and now >= host.until:
            host.rest_s = min(max(2 * host.rest_s, _FIRST_REST_S), LONGEST_REST_S)
            host.until, host.reason = now + host.rest_s, DropReason.HOST_DOWN

    def _is_down(self, host: _Host) -> bool:
        return 0 < self._settings.host_failures <= host.failures
