"""An answer whose head was read, and its body: framing and codings undone, within bounds."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from schemas.drops import DropReason
from stages.base import Dropped
from stages.fetch.base import LOCAL_TROUBLE
from stages.fetch.http.http1 import LARGE_PIECE, Chunks, Head, Inflated
from stages.fetch.http.link import Link

_READ = 64 << 10
"""Bytes at a time of a promising body that must be decoded."""
_LARGE = 512 << 10
"""Bytes still to come, or where nobody said how many: here already, that are worth a connection of their own."""
_OVERHEAD = 64 << 10
"""Bytes of chunked coding that are free; beyond that it may take a quarter of download.max_bytes."""


class Sink(Protocol):
    """What takes a body; all its methods may raise `Dropped`. See `stages.fetch.body.Body`."""

    promising: bool

    def announce(self, length: int | None) -> None:
        """Take note of the Content-Length."""

    def feed(self, chunk: bytes) -> None:
        """Take a chunk."""

    def room(self) -> memoryview:
        """Where the next bytes may be written: no more than were announced."""

    def took(self, count: int) -> None:
        """Count bytes that were written into the room."""


class Response:
    """A head, and the body to come. Close it in the end: a connection that is fit for it is used again."""

    def __init__(
        self,
        head: Head,
        rest: bytes,
        over: Link,
        max_bytes: int,
        give_back: Callable[[Link], None],
    ) -> None:
        """Take over the link; `rest` is what came with the head."""
        self.head = head
        self._rest = rest
        self._link = over
        self._max_bytes = max_bytes
        self._give_back = give_back
        self._at_end = head.length == len(rest)
        """The body was read to its end, and not a byte more."""

    def close(self) -> None:
        """Let go of the connection."""
        if self._at_end and self.head.keep and not self._link.wide:
            self._give_back(self._link)
        else:
            self._link.close()

    async def into(self, sink: Sink) -> None:
        """Hand the whole body to `sink`.

        Raises:
            Dropped: INCOMPLETE_BODY, TOO_MANY_BYTES, HTTP_ERROR, or what the sink raises.
            OSError: for this machine's own trouble.
        """
        sink.announce(self.head.length)
        try:
            if self.head.chunked or self.head.coding:
                await self._decoded(sink)
            else:
                await self._plain(sink)
        except OSError as error:
            if error.errno in LOCAL_TROUBLE:
                raise
            raise Dropped(DropReason.INCOMPLETE_BODY) from error

    async def _plain(self, sink: Sink) -> None:
        """The usual case: straight from the socket to where the body stays."""
        length = self.head.length
        size = len(self._rest) if length is None else min(len(self._rest), length)
        if size:
            sink.feed(self._rest[:size])
        while size != length:
            self._widen(sink, size)
            with sink.room() as room:
                count = await self._link.receive(room)
            if not count:
                break
            size += count
            sink.took(count)
        self._ended(size == length or length is None)
        self._at_end = size == length and len(self._rest) <= size

    async def _decoded(self, sink: Sink) -> None:
        chunks = Chunks() if self.head.chunked else None
        unpacked = Inflated(self.head.coding) if self.head.coding else None
        async for data in self._wire(sink):
            for piece in chunks.feed(data) if chunks else (data,):
                for part in unpacked.feed(piece) if unpacked else (piece,):
                    sink.feed(part)
                    if len(part) >= LARGE_PIECE:
                        await asyncio.sleep(0)  # a bomb unfolds in the turns of others
            if chunks and chunks.done:
                break
        self._ended((chunks is None or chunks.done) and (unpacked is None or unpacked.done))
        if chunks is not None:
            self._at_end = chunks.clean

    async def _wire(self, sink: Sink) -> AsyncIterator[bytes]:
        """The bytes as they come over the wire, up to the Content-Length or the end of the connection."""
        left = self.head.length if self.head.length is not None else self._max_bytes * 5 // 4 + _OVERHEAD
        data, space, size = self._rest, self._link.space, 0
        while True:
            if data:
                yield data[:left]
                left -= len(data)
                size += len(data)
            if left <= 0:
                self._at_end = left == 0
                break
            if sink.promising and len(space) < _READ:
                space = memoryview(bytearray(_READ))
            self._widen(sink, size)
            count = await self._link.receive(space[:left])
            if not count:
                return
            data = bytes(space[:count])
        if self.head.length is None:
            raise Dropped(DropReason.TOO_MANY_BYTES)

    def _widen(self, sink: Sink, size: int) -> None:
        """Let the server send ahead where much of a promising body is to come after these bytes."""
        length = self.head.length
        if sink.promising and (size if length is None else length - size) > _LARGE:
            self._link.widen()

    def _ended(self, well: bool) -> None:
        if not well:
            raise Dropped(DropReason.INCOMPLETE_BODY)
