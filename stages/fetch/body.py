"""A body as it arrives: bounded, and looked at early, so that a hopeless one is not read to its end."""

from schemas.drops import DropReason
from stages.base import Dropped
from stages.pixels import headers
from stages.settings import Settings

_FIRST_LOOK = 4 << 10
_LAST_LOOK = 1 << 20
_GROWTH = 4
_FIRST_ROOM = 16 << 10
"""Bytes read at a time before the header is seen."""
_MOST_ROOM = 1 << 20
"""Memory that is set aside on the word of a Content-Length alone, bytes."""


class Body:
    """Collects bytes, and raises `Dropped` as soon as they show that the image cannot be kept.

    They come by `feed`, or are read into `room` and counted by `took`: that spares a copy.
    """

    def __init__(self, settings: Settings) -> None:
        """Start empty."""
        self._max_bytes = settings.download.max_bytes
        self._min_px = settings.filter.min_image_px
        self._data = bytearray()
        self._size = 0
        self._announced: int | None = None
        self._next_look: float = _FIRST_LOOK
        self.promising = False
        """The header is seen, and large enough."""

    def announce(self, length: int | None) -> None:
        """Take note of the Content-Length.

        Raises:
            Dropped: TOO_MANY_BYTES, before any of them is read.
        """
        if length is not None and length > self._max_bytes:
            raise Dropped(DropReason.TOO_MANY_BYTES)
        self._announced = length

    def feed(self, chunk: bytes) -> None:
        """Take a chunk.

        Raises:
            Dropped: TOO_MANY_BYTES, SMALL_IMAGE (with width and height), NOT_AN_IMAGE (a web page).
        """
        self._data[self._size :] = chunk
        self.took(len(chunk))

    def room(self) -> memoryview:
        """Where the next bytes may be written, at least one; to be released before the body is used otherwise."""
        if self._size == len(self._data):
            grown = bytearray(self._capacity())
            grown[: self._size] = self._data
            self._data = grown
        end = len(self._data) if self._settled else self._size + _FIRST_ROOM
        return memoryview(self._data)[self._size : end]

    def took(self, count: int) -> None:
        """Count bytes that were written into the room; raises as `feed` does."""
        self._size += count
        if self._size > self._max_bytes:
            raise Dropped(DropReason.TOO_MANY_BYTES)
        if self._size >= self._next_look:
            self._look()

    def finish(self) -> bytearray:
        """All bytes of a complete body.

        Raises:
            Dropped: EMPTY_BODY, or what a last look shows.
        """
        if not self._size:
            raise Dropped(DropReason.EMPTY_BODY)
        if self._size < _FIRST_LOOK:
            self._look()
        del self._data[self._size :]
        return self._data

    @property
    def _settled(self) -> bool:
        return self._next_look == float("inf")

    def _capacity(self) -> int:
        """Room for what was announced, though not on a word alone; else twice of what is here."""
        trusted = _MOST_ROOM if self.promising and self._announced else _FIRST_ROOM
        wanted = max(2 * self._size, trusted)
        return max(min(wanted, self._announced or self._max_bytes + 1), self._size + 1)

    def _look(self) -> None:
        prefix = bytes(memoryview(self._data)[: self._size])
        header = headers.sniff(prefix)
        if header is None and headers.is_web_page(prefix):
            raise Dropped(DropReason.NOT_AN_IMAGE)
        if header is not None and min(header.width, header.height) < self._min_px:
            raise Dropped(DropReason.SMALL_IMAGE, width=header.width, height=header.height)
        self.promising = header is not None
        # Each look costs as much as what it sees: at growing sizes, and never again once the size is known.
        settled = self.promising or self._size >= _LAST_LOOK
        self._next_look = float("inf") if settled else max(self._next_look * _GROWTH, self._size + 1)
