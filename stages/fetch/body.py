"""A body as it arrives: bounded, and looked at early, so that a hopeless one is not read to its end."""

from schemas.drops import Dropped, DropReason
from stages.pixels import headers
from stages.settings import Settings

_FIRST_LOOK = 4 << 10
_LAST_LOOK = 1 << 20
_GROWTH = 4


class Body:
    """Collects bytes, and raises `Dropped` as soon as they show that the image cannot be kept."""

    def __init__(self, settings: Settings) -> None:
        self._max_bytes = settings.download.max_bytes
        self._min_px = settings.filter.min_image_px
        self._chunks: list[bytes] = []
        self._size = 0
        self._next_look: float = _FIRST_LOOK

    def __len__(self) -> int:
        return self._size

    def announce(self, length: int | None) -> None:
        """Take note of the Content-Length; a drop as TOO_MANY_BYTES before any of them is read."""
        if length is not None and length > self._max_bytes:
            raise Dropped(DropReason.TOO_MANY_BYTES)

    def feed(self, chunk: bytes) -> None:
        """Take a chunk; drops as TOO_MANY_BYTES, SMALL_IMAGE (with width and height), NOT_AN_IMAGE (a web page)."""
        self._chunks.append(chunk)
        self._size += len(chunk)
        if self._size > self._max_bytes:
            raise Dropped(DropReason.TOO_MANY_BYTES)
        if self._size >= self._next_look:
            self._look()

    def finish(self) -> bytes:
        if not self._size:
            raise Dropped(DropReason.EMPTY_BODY)
        if self._size < _FIRST_LOOK:
            self._look()
        return b"".join(self._chunks)

    def _look(self) -> None:
        prefix = b"".join(self._chunks)
        self._chunks = [prefix]
        header = headers.sniff(prefix)
        if header is None and headers.is_web_page(prefix):
            raise Dropped(DropReason.NOT_AN_IMAGE)
        if header is not None and min(header.width, header.height) < self._min_px:
            raise Dropped(DropReason.SMALL_IMAGE, width=header.width, height=header.height)
        # Each look costs as much as what it sees: at growing sizes, and never again once the size is known.
        is_settled = header is not None or self._size >= _LAST_LOOK
        self._next_look = float("inf") if is_settled else max(self._next_look * _GROWTH, self._size + 1)
