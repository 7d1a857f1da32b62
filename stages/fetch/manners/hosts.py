"""Which hosts are left alone for a while: those that asked for it (Retry-After), and those that fail again and again.

What a row of such a host gets depends on when its turn comes. All reasons that are given here are among
`SECOND_CHANCE`: a later pass fetches those rows.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

from schemas.drops import DropReason
from stages.base import Dropped
from stages.fetch.address import Origin
from stages.fetch.base import Refused
from stages.settings import DownloadSettings

_TROUBLE = frozenset(
    {
        DropReason.TIMEOUT,
        DropReason.CONNECTION_ERROR,
        DropReason.INCOMPLETE_BODY,
        DropReason.SERVER_ERROR,
        DropReason.RATE_LIMITED,
    }
)
"""What counts against a host. All else shows that it is up."""
_FIRST_REST_S = 10.0
_LONGEST_REST_S = 600.0
"""Also the longest that a Retry-After is heeded without asking again."""
_PAUSE_S = 0.25
"""After each deadline that passed: others that pass at the same time are heard of before yet another row begins."""
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
    """The health of all hosts that this process asks; may be used from several threads.

    After `download.host_failures` failures in a row a host rests, each time twice as long. Then one row tries it, while
    the others wait for what it finds.
    """

    def __init__(self, settings: DownloadSettings) -> None:
        """Know nothing."""
        self._told = settings
        self._known: OrderedDict[Origin, _Host] = OrderedDict()
        self._lock = Lock()

    def wait_s(self, origin: Origin) -> float:
        """How long to wait before asking this host, and then to ask here again; 0 for: go.

        Raises:
            Dropped: when it rests for longer than a row may wait.
        """
        with self._lock:
            host = self._known.get(origin)
            return self._judged(host, time.monotonic()) if host is not None else 0.0

    def _judged(self, host: _Host, now: float) -> float:
        if now < host.until:
            if host.reason is DropReason.HOST_DOWN or host.until - now > self._told.timeout_s:
                raise Dropped(host.reason)
            return host.until - now
        if not self._is_down(host):
            return max(0.0, host.pause_until - now) if self._told.host_failures else 0.0
        if now < host.probe_until:
            return _LOOK_AGAIN_S
        host.probe_until = now + self._told.timeout_s
        return 0.0

    def _is_down(self, host: _Host) -> bool:
        return 0 < self._told.host_failures <= host.failures

    def saw(self, origin: Origin, failure: Dropped | None) -> None:
        """Take note of how an attempt at a host ended; None for well."""
        troubled = failure is not None and failure.reason in _TROUBLE
        if not troubled and origin not in self._known:
            return
        with self._lock:
            if failure is None or not troubled:
                self._recovered(origin, time.monotonic())
                return
            host = self._known.setdefault(origin, _Host())
            self._known.move_to_end(origin)
            if len(self._known) > _MOST_HOSTS:
                self._known.popitem(last=False)
            self._failed(host, failure, time.monotonic())

    def _recovered(self, origin: Origin, now: float) -> None:
        host = self._known.pop(origin, None)
        if host is not None and now < host.until and host.reason is not DropReason.HOST_DOWN:
            # It answers, but it has asked for rest: requests that were under way do not end that.
            self._known[origin] = _Host(until=host.until, reason=host.reason)

    def _failed(self, host: _Host, failure: Dropped, now: float) -> None:
        host.failures += 1
        if failure.reason is DropReason.TIMEOUT:
            host.pause_until = now + _PAUSE_S
        host.probe_until = 0.0
        asked_s = failure.retry_after_s if isinstance(failure, Refused) else None
        if asked_s:
            host.until = max(host.until, now + min(asked_s, _LONGEST_REST_S))
            host.reason = failure.reason
        elif self._is_down(host) and now >= host.until:
            host.rest_s = min(max(2 * host.rest_s, _FIRST_REST_S), _LONGEST_REST_S)
            host.until, host.reason = now + host.rest_s, DropReason.HOST_DOWN
