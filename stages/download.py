"""The download stage: the bytes of an image, from the web or from where they lie already."""

import pkgutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

import pyarrow as pa

from schemas.digest import sha256
from schemas.drops import Dropped, DropReason
from stages.base import DROP, Stage, to_table
from stages.fetch import ENGINES
from stages.fetch.engine import MOST_ROWS, Engine, FetchTimes, Outcome
from stages.fetch.stored import Stored
from stages.runtime import Runtime
from stages.settings import Settings

_STORED_AHEAD = 4
"""Tables whose images are read from where they lie before their turn."""


class Download(Stage):
    """Fetches each row's image file; a row with an image_ref is read from where that says instead.

    May be called from several threads at once. Width and height are written only for rows that are dropped as
    SMALL_IMAGE, whose bodies were not read to their end.
    """

    name = "download"
    reads = ("url", "image_ref")
    writes = ("image", "sha256", "n_bytes", "width", "height")
    drops = (
        *(DropReason.BAD_URL, DropReason.SMALL_IMAGE, DropReason.FORBIDDEN_ADDRESS, DropReason.DNS_ERROR),
        *(DropReason.CONNECTION_ERROR, DropReason.TIMEOUT, DropReason.HOST_DOWN, DropReason.NOT_FOUND),
        *(DropReason.ACCESS_DENIED, DropReason.RATE_LIMITED, DropReason.HTTP_ERROR, DropReason.SERVER_ERROR),
        *(DropReason.REDIRECT_LOOP, DropReason.TOO_MANY_BYTES, DropReason.EMPTY_BODY, DropReason.INCOMPLETE_BODY),
        *(DropReason.ROBOTS_TXT, DropReason.OPTED_OUT, DropReason.NOT_IN_TAR, DropReason.NO_FILE),
        DropReason.NOT_AN_IMAGE,
    )

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self._engine: Engine = pkgutil.resolve_name(ENGINES[settings.download.engine])(settings, runtime)
        self._stored, self._reader = Stored(settings), ThreadPoolExecutor(1, thread_name_prefix="faceshards-stored")

    def __call__(self, table: pa.Table) -> pa.Table:
        return next(self.stream(iter([table])))

    def stream(self, tables: Iterator[pa.Table], most_rows: int = MOST_ROWS) -> Iterator[pa.Table]:
        """What becomes of each table, in their order; up to `most_rows` rows are fetched before their turn.

        `tables` is read ahead, in this thread. What becomes of a row does not depend on the tables' sizes.
        """
        waiting: deque[list[str | None]] = deque()
        """The `image_ref` of each row, by tables."""
        reading: deque[Future[list[Outcome]] | None] = deque()
        """Of the first tables that wait: the images that lie somewhere."""

        def urls() -> Iterator[str | None]:
            for table in tables:
                waiting.append(table["image_ref"].to_pylist())
                # The engine drops what is no URL at once: so its outcomes keep step with the rows.
                rows = zip(table["url"].to_pylist(), waiting[-1], strict=True)
                yield from (url if ref is None else None for url, ref in rows)

        fetched: list[Outcome] = []
        for outcome in chain(self._engine.stream(urls(), most_rows), [None]):
            if outcome is not None:
                fetched.append(outcome)
            while waiting and len(waiting[0]) == len(fetched):
                while len(reading) < min(_STORED_AHEAD, len(waiting)):
                    refs = [ref for ref in waiting[len(reading)] if ref is not None]
                    reading.append(self._reader.submit(self._stored.read, refs) if refs else None)
                read = reading.popleft()
                stored, pairs = iter(read.result() if read else ()), zip(waiting.popleft(), fetched, strict=True)
                outcomes = (fetch if ref is None else next(stored) for ref, fetch in pairs)
                rows = [
                    {**outcome.measured, DROP: outcome.reason}
                    if isinstance(outcome, Dropped)
                    else {"image": outcome, "sha256": sha256(outcome), "n_bytes": len(outcome)}
                    for outcome in outcomes
                ]
                fetched = []
                yield to_table(rows, self)

    def take_times(self) -> FetchTimes:
        return self._engine.take_times()

    def close(self) -> None:
        self._engine.close()
        self._reader.shutdown(cancel_futures=True)
        self._stored.close()
