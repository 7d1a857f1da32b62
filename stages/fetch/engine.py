"""What a fetching engine is, and how long servers and the resolver take, for those who watch a run."""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from schemas.drops import Dropped
from stages.runtime import Runtime
from stages.settings import Settings

Outcome = bytes | Dropped
"""The image file, or why there is none."""

MOST_ROWS = 8192
"""URLs that are begun before their turn: enough that the rows behind a host that drips are fetched meanwhile."""

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


class Engine(Protocol):
    """Fetches image files; may be called from several threads at once."""

    def __init__(self, settings: Settings, runtime: Runtime) -> None: ...

    def stream(self, urls: Iterable[str | None], most_rows: int = MOST_ROWS) -> Iterator[Outcome]:
        """The outcome of each URL, in their order; up to `most_rows` of them are begun before their turn.

        `urls` is read ahead, in the thread that asks for outcomes.

        Raises:
            OSError: for this machine's own trouble.
        """

    def take_times(self) -> FetchTimes:
        """Times of hosts and the resolver since the last call."""

    def close(self) -> None:
        """Let go of threads and connections; a closed engine fetches nothing more."""
