"""HTTP/1.1 answers from hostile servers (RFC 9112): heads, chunks and codings, each within bounds. No sockets here."""

import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from schemas.drops import DropReason
from stages.base import Dropped
from stages.fetch.address import Url

MOST_HEAD = 64 << 10
"""Bytes of a head, and of all heads of one answer (1xx) together."""
_MOST_FIELDS = 256
MOST_INTERIM = 8
"""1xx heads before the answer itself."""
_MOST_SIZE_LINE = 1 << 10
_MOST_TRAILERS = 8 << 10
_FREE_CHUNKS, _BYTES_PER_CHUNK = 1000, 64
"""A body of one-byte chunks costs us far more than its sender."""
LARGE_PIECE = 256 << 10
"""Bytes that are unfolded at a time."""

_START = b"HTTP/1."
_STATUS = re.compile(rb"HTTP/1\.([01])[ \t]+([1-9][0-9]{2})(?:[ \t]|$)")
_ENDS = (b"\n\r\n", b"\n\n")
_FOLD = re.compile(rb"\r?\n[ \t]+")
_FIELD = re.compile(
    rb"\n(x-robots-tag|retry-after|location|content-length|transfer-encoding|content-encoding|connection)"
    rb"[ \t]*:[ \t]*([^\r\n]*)",
    re.IGNORECASE,
)
_SIZE = re.compile(rb"[ \t]*([0-9a-f]{1,8})[ \t]*(?:;.*)?", re.IGNORECASE | re.DOTALL)
_NO_CODING = frozenset({"", "identity", "none", "utf-8", "binary", "8bit"})
"""Values of Content-Encoding under which servers send the file as it is; those after identity are their mistakes."""


class Head(NamedTuple):
    """As much of an answer's head as matters here."""

    status: int
    robots_tags: list[str]
    retry_after: str | None
    location: str | None
    length: int | None
    """Content-Length; None when the body ends otherwise."""
    chunked: bool
    coding: str
    """Content-Encoding, empty for none."""
    keep: bool
    """The connection may be used again, once the body has ended."""


def _require(holds: bool) -> None:
    if not holds:
        raise Dropped(DropReason.HTTP_ERROR)


def request(url: Url, user_agent: str) -> bytes:
    """A GET request."""
    return (
        f"GET {url.target} HTTP/1.1\r\nHost: {url.authority}\r\nUser-Agent: {user_agent}\r\n"
        "Accept: */*\r\nAccept-Encoding: identity\r\n\r\n"
    ).encode()


def find_end(data: bytes, seen: int = 0) -> int | None:
    """Where the body begins; None while the head is not complete. It was not within the first `seen` bytes.

    Raises:
        Dropped: HTTP_ERROR when this is no HTTP, or the head is too long.
    """
    _require(data.startswith(_START[: len(data)]))
    # From just before what is new: a head that drips must not be searched from its beginning each time.
    found = [(place, len(end)) for end in _ENDS if (place := data.find(end, max(0, seen - len(end)))) >= 0]
    place, size = min(found, default=(len(data), 0))
    _require(place + size <= MOST_HEAD)
    return place + size if found else None


def parse_head(block: bytes) -> Head:
    """A head with all its lines.

    Raises:
        Dropped: HTTP_ERROR when it is malformed, or leaves open where the body ends.
    """
    start = _STATUS.match(block.partition(b"\n")[0].rstrip(b"\r"))
    if start is None or block.count(b"\n") > _MOST_FIELDS:
        raise Dropped(DropReason.HTTP_ERROR)
    fields: dict[str, list[str]] = {}
    if b"\n " in block or b"\n\t" in block:
        block = _FOLD.sub(b" ", block)
    for name, value in _FIELD.findall(block):
        fields.setdefault(name.lower().decode(), []).append(value.decode("latin-1").strip())
    status = int(start[2])
    chunked = _chunked(fields.get("transfer-encoding", []))
    length = _length(status, fields.get("content-length", []))
    connection = ",".join(fields.get("connection", ())).lower()
    return Head(
        status=status,
        robots_tags=fields.get("x-robots-tag", []),
        retry_after=_first(fields, "retry-after"),
        location=_first(fields, "location"),
        length=None if chunked else length,
        chunked=chunked,
        coding=_coding(fields.get("content-encoding", [])),
        # Both lengths at once: some proxy on the way may have seen another end than we do.
        keep=start[1] == b"1" and "close" not in connection and chunked == (length is None),
    )


def _first(fields: dict[str, list[str]], name: str) -> str | None:
    return fields[name][0] if name in fields else None


def _chunked(values: list[str]) -> bool:
    words = [word.strip().lower() for value in values for word in value.split(",")]
    if words and words not in (["chunked"], ["identity"]):
        raise Dropped(DropReason.HTTP_ERROR)
    return words == ["chunked"]


def _length(status: int, values: list[str]) -> int | None:
    if status in (204, 304) or status < 200:
        return 0
    told = {word.strip() for value in values for word in value.split(",")}
    if not told:
        return None
    digits = told.pop()
    if told or not digits.isascii() or not digits.isdecimal() or len(digits) > 18:
        raise Dropped(DropReason.HTTP_ERROR)
    return int(digits)


def _coding(values: list[str]) -> str:
    coding = ",".join(values).strip().lower()
    return "" if coding in _NO_CODING else coding


class Chunks:
    """The chunked coding; what comes behind its end is not looked at."""

    def __init__(self) -> None:
        """Begin before the first chunk."""
        self.done = False
        self.clean = False
        """Nothing came behind the end."""
        self._pending = b""
        self._left = 0
        self._count = 0
        self._bytes = 0
        self._gap = False
        """The line that ends a chunk comes next."""
        self._last = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The payload in these bytes.

        Raises:
            Dropped: HTTP_ERROR for what is no chunk, or for a flood of tiny ones.
        """
        data, self._pending = self._pending + data, b""
        place = 0
        while place < len(data) and not self.done:
            if self._left:
                piece = data[place : place + self._left]
                place += len(piece)
                self._left -= len(piece)
                self._gap = not self._left
                yield piece
                continue
            end = data.find(b"\n", place)
            if end < 0 or end - place > _MOST_SIZE_LINE:
                self._keep(data[place:], end)
                return
            self._line(data[place:end].rstrip(b"\r"))
            place = end + 1
        self.clean = place == len(data)

    def _keep(self, rest: bytes, end: int) -> None:
        _require(end < 0 and len(rest) <= _MOST_SIZE_LINE)
        self._pending = rest

    def _line(self, line: bytes) -> None:
        if self._last:
            self._trailer(line)
        elif self._gap:
            self._gap = False
            _require(not line)
        else:
            self._size(line)

    def _size(self, line: bytes) -> None:
        size = _SIZE.fullmatch(line)
        _require(size is not None)
        self._left = int(size[1], 16) if size else 0
        self._count += 1
        _require(self._count <= _FREE_CHUNKS + self._bytes / _BYTES_PER_CHUNK)
        self._last = self._left == 0
        self._bytes = 0 if self._last else self._bytes + self._left

    def _trailer(self, line: bytes) -> None:
        self._bytes += len(line) + 1
        _require(self._bytes <= _MOST_TRAILERS)
        self.done = not line


class Inflated:
    """gzip or deflate, in pieces of bounded size however much a byte unfolds to."""

    def __init__(self, coding: str) -> None:
        """Begin a stream.

        Raises:
            Dropped: HTTP_ERROR for any other coding: it was not asked for, and is not undone.
        """
        if coding not in ("gzip", "x-gzip", "deflate"):
            raise Dropped(DropReason.HTTP_ERROR)
        self._unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
        self._begun = coding != "deflate"
        self._held = b""

    @property
    def done(self) -> bool:
        """The stream has its end."""
        return self._unpacker.eof

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What these bytes unfold to.

        Raises:
            Dropped: HTTP_ERROR when they are not in this coding.
        """
        if not self._begun:
            data, self._held = self._held + data, b""
            self._begin(data)
        while data and self._begun and not self._unpacker.eof:
            try:
                yield self._unpacker.decompress(data, LARGE_PIECE)
            except zlib.error as error:
                raise Dropped(DropReason.HTTP_ERROR) from error
            data = self._unpacker.unconsumed_tail

    def _begin(self, data: bytes) -> None:
        """Half of all servers that say deflate leave out its zlib header (RFC 1950, 2.2): two bytes tell."""
        if len(data) < 2:
            self._held = data
            return
        self._begun = True
        if data[0] & 0x0F != zlib.DEFLATED or int.from_bytes(data[:2]) % 31:
            self._unpacker = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
