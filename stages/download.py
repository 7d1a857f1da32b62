"""The download stage: the bytes of an image, from the web or from an existing download."""

import pkgutil
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from schemas.digest import sha256
from schemas.drops import DropReason
from stages.base import DROP, Dropped, to_table
from stages.fetch import ENGINES, tar
from stages.fetch.base import Engine, Outcome
from stages.runtime import Runtime
from stages.settings import Settings

_MOST_CHUNK = np.iinfo(np.int32).max
"""Bytes in one chunk of a column: Arrow counts them in 32 bits."""


class Download:
    """Fetches each row's image file; a row with an image_ref is read from the tar that it names instead.

    May be called from several threads at once. Width and height are written only for rows that are dropped as
    SMALL_IMAGE, whose bodies were not read to their end.
    """

    name: ClassVar[str] = "download"
    reads: ClassVar[tuple[str, ...]] = ("url", "image_ref")
    writes: ClassVar[tuple[str, ...]] = ("image", "sha256", "n_bytes", "width", "height")
    drops: ClassVar[tuple[DropReason, ...]] = (
        DropReason.BAD_URL,
        DropReason.SMALL_IMAGE,
        DropReason.FORBIDDEN_ADDRESS,
        DropReason.DNS_ERROR,
        DropReason.CONNECTION_ERROR,
        DropReason.TIMEOUT,
        DropReason.HOST_DOWN,
        DropReason.NOT_FOUND,
        DropReason.ACCESS_DENIED,
        DropReason.RATE_LIMITED,
        DropReason.HTTP_ERROR,
        DropReason.SERVER_ERROR,
        DropReason.REDIRECT_LOOP,
        DropReason.TOO_MANY_BYTES,
        DropReason.EMPTY_BODY,
        DropReason.INCOMPLETE_BODY,
        DropReason.ROBOTS_TXT,
        DropReason.OPTED_OUT,
        DropReason.NOT_IN_TAR,
        DropReason.NOT_AN_IMAGE,
    )

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        """Start the engine that `settings.download.engine` names."""
        self._settings = settings
        self._engine: Engine = pkgutil.resolve_name(ENGINES[settings.download.engine])(settings, runtime)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Fetch all rows, as many at a time as the settings allow."""
        urls, refs = table["url"].to_pylist(), table["image_ref"].to_pylist()
        stored = iter(tar.read([ref for ref in refs if ref is not None], self._settings))
        fetched = iter(self._engine.fetch([url for url, ref in zip(urls, refs, strict=True) if ref is None]))
        outcomes = [next(fetched if ref is None else stored) for ref in refs]
        return _with_images([self._row(outcome) for outcome in outcomes], self.writes, self.drops)

    def close(self) -> None:
        """Let go of the engine's threads and connections."""
        self._engine.close()

    def _row(self, outcome: Outcome) -> dict[str, Any]:
        if isinstance(outcome, Dropped):
            return {**outcome.measured, DROP: outcome.reason}
        return {"sha256": sha256(outcome), "n_bytes": len(outcome), "image": outcome}


def _with_images(rows: list[dict[str, Any]], writes: tuple[str, ...], drops: tuple[DropReason, ...]) -> pa.Table:
    images = _binary([row.pop("image", None) for row in rows])
    table = to_table(rows, writes, drops)
    return table.set_column(table.column_names.index("image"), "image", images)


def _binary(values: Sequence[bytes | bytearray | None]) -> pa.ChunkedArray:
    """Values as a column: copied once, where pyarrow's own builder grows, and copies what it has again and again."""
    chunks: list[list[bytes | bytearray | None]] = [[]]
    size = 0
    for value in values:
        size += len(value or b"")
        if size > _MOST_CHUNK:
            chunks.append([])
            size = len(value or b"")
        chunks[-1].append(value)
    return pa.chunked_array(map(_chunk, chunks), pa.binary())


def _chunk(values: Sequence[bytes | bytearray | None]) -> pa.Array:
    ends = np.cumsum([0, *(len(value or b"") for value in values)], dtype=np.int32)
    data = pa.allocate_buffer(int(ends[-1]))
    view = memoryview(data).cast("B")
    for value, start, end in zip(values, ends[:-1], ends[1:], strict=True):
        view[start:end] = value or b""
    present = np.packbits(np.array([value is not None for value in values], bool), bitorder="little")
    return pa.Array.from_buffers(pa.binary(), len(values), [pa.py_buffer(present), pa.py_buffer(ends), data])
