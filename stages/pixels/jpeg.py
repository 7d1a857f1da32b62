"""JPEG files from the outside: their segments up to the first scan, in bounded time. No pixel is decoded.

A hostile file may consist of millions of empty segments, or of scans: whoever walks over them is stopped.
"""

import io
import re
import struct
from collections.abc import Iterator
from functools import cache, lru_cache

import numpy as np
from PIL import Image as Pillow

from schemas.arrays import Integers

_SEGMENTS = 4096
"""Steps of a walk; 50 MB of full segments are 800."""
MAX_SCANS = 100
"""Usual progressive files have about 10; each further one costs a walk over all blocks, however short it is."""

_DQT, _SOS, _EOI = 0xDB, 0xDA, 0xD9
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})
"""Markers without a length."""
_NOT_FILL = re.compile(rb"[^\xff]")


class Endless(ValueError):
    """The file has far more segments than any picture."""


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the content of the segments up to the first scan, which is the last one.

    A marker stands four bytes before its content.

    Raises:
        ValueError: when the data end before it.
        Endless: when they hold too many of them.
    """
    position = 2
    for _ in range(_SEGMENTS):
        position = data.find(b"\xff", position)
        end_of_fill = _NOT_FILL.search(data, position) if position >= 0 else None
        if end_of_fill is None:
            raise ValueError("no scan")
        marker, start = data[end_of_fill.start()], end_of_fill.end()
        if marker == _EOI:
            raise ValueError("the end comes before the first scan")
        length = 0 if marker == 0 or marker in _BARE else int.from_bytes(data[start : start + 2])
        if length:
            yield marker, start + 2, start + length
        if marker == _SOS:
            return
        position = start + length
    raise Endless("too many segments")


def first_scan(data: bytes) -> int | None:
    """Where the first scan's marker stands, None when there is none; Endless when nobody can tell."""
    try:
        return next((start - 4 for marker, start, _ in segments(data) if marker == _SOS), None)
    except Endless:
        raise
    except ValueError:
        return None


def count_scans(data: bytes) -> int:
    """How many scans there are at most: in scans themselves the marker's bytes cannot occur."""
    start = first_scan(data)
    if start is None:
        return 0
    later = np.frombuffer(data, np.uint8, offset=start)  # bytes.count takes three times as long
    return int(np.count_nonzero((later[:-1] == 0xFF) & (later[1:] == _SOS)))


def quality(data: bytes) -> int:
    """The quality, 1 to 100, at which libjpeg takes the table that is nearest to a file's first; 0 without a table."""
    table = _table(data)
    return 0 if table is None else _quality(table)


@lru_cache
def _quality(table: tuple[int, ...]) -> int:
    return 1 + int(np.abs(_tables() - table).sum(axis=1).argmin())


def _table(data: bytes) -> tuple[int, ...] | None:
    """The 64 values of the first quantisation table, in the order of the file (ITU T.81, B.2.4.1)."""
    for marker, start, end in segments(data):
        if marker == _DQT and start < end:
            kind, content = ">64H" if data[start] >> 4 else "64B", data[start + 1 : end]
            return struct.unpack_from(kind, content) if len(content) >= struct.calcsize(kind) else None
    return None


@cache
def _tables() -> Integers:
    """(100, 64): those of libjpeg by quality."""
    tables = []
    for level in range(1, 101):
        file = io.BytesIO()
        Pillow.new("L", (8, 8)).save(file, "JPEG", quality=level)
        tables.append(_table(file.getvalue()))
    return np.array(tables)
