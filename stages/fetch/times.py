"""How long servers and the resolver take: for those who watch a run, never for a verdict."""

import threading
from collections import Counter
from dataclasses import dataclass, field

RESOLVER = "the resolver"
"""Stands among the hosts for the names that were looked up and have an address."""


@dataclass
class FetchTimes:
    """By host; of redirects the last one counts. Waits in our own queues are left out."""

    fetches: Counter[str] = field(default_factory=Counter)
    microseconds: Counter[str] = field(default_factory=Counter)


class Stopwatch:
    """Adds up the times of this process; may be used from any thread."""

    def __init__(self) -> None:
        self._lock, self._times = threading.Lock(), FetchTimes()

    def add(self, host: str, seconds: float) -> None:
        with self._lock:
            self._times.fetches[host] += 1
            self._times.microseconds[host] += round(1e6 * seconds)

    def take(self) -> FetchTimes:
        """What was added since the last call."""
        with self._lock:
            times, self._times = self._times, FetchTimes()
        return times
