"""What a fetching engine is."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from stages.base import Dropped
from stages.fetch.times import FetchTimes
from stages.runtime import Runtime
from stages.settings import Settings

Outcome = bytes | Dropped
"""The image file, or why there is none."""

MOST_ROWS = 8192
"""URLs that are begun before their turn: enough that the rows behind a host that drips are fetched meanwhile."""


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
