"""Content codings that were not requested and come anyway, undone within bounds."""

import zlib
from collections.abc import Iterator

from schemas.drops import Dropped, DropReason

LARGE_PIECE = 256 << 10
"""Bytes that are unfolded at a time."""
_CODINGS = {"gzip": True, "x-gzip": True, "deflate": False}
"""Coding -> whether it is gzip, of which several may follow each other."""


def inflated(content_encoding: str) -> "Inflated | None":
    """What undoes a Content-Encoding; None where the body is taken as it comes.

    Servers write all kinds of words there (utf-8, aws-chunked, image/jpeg) under which they send the file as it is.

    Raises:
        Dropped: HTTP_ERROR for several codings on top of each other.
    """
    codings = [word.strip() for word in content_encoding.lower().split(",") if word.strip() not in ("", "identity")]
    if len(codings) == 1 and codings[0] in _CODINGS:
        return Inflated(_CODINGS[codings[0]])
    if _CODINGS.keys() & codings:
        raise Dropped(DropReason.HTTP_ERROR)
    return None


class Inflated:
    """gzip (one member or several) or deflate, in pieces of bounded size however much a byte unfolds to."""

    def __init__(self, is_gzip: bool) -> None:
        self._is_gzip = is_gzip
        self._unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
        self._is_begun = False
        self._held = b""
        """Too little to see what it begins."""

    @property
    def is_done(self) -> bool:
        return self._unpacker.eof

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What these bytes unfold to; a drop as HTTP_ERROR when they are not in this coding."""
        data, self._held = self._held + data, b""
        while data:
            if not self._is_begun or self._unpacker.eof:
                if len(data) < 2:
                    self._held = data
                    return
                if self._is_begun and not (self._is_gzip and data.startswith(b"\x1f\x8b")):
                    return  # what follows the end is filling
                # Half of all servers that say deflate leave out its zlib header (RFC 1950, 2.2): two bytes show it.
                is_raw = not self._is_gzip and (data[0] & 0x0F != zlib.DEFLATED or int.from_bytes(data[:2]) % 31)
                self._unpacker = zlib.decompressobj(wbits=-zlib.MAX_WBITS if is_raw else zlib.MAX_WBITS | 32)
                self._is_begun = True
            try:
                yield self._unpacker.decompress(data, LARGE_PIECE)
            except zlib.error as error:
                raise Dropped(DropReason.HTTP_ERROR) from error
            data = self._unpacker.unused_data if self._unpacker.eof else self._unpacker.unconsumed_tail
