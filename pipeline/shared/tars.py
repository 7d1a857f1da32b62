"""Webdataset tars: their members, and their samples.

A sample is the files of one key, which lie together: `<key>.<suffix>`, split at the first dot as webdataset does.
Headers may claim anything: no more memory is taken than there are bytes.
"""

import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import groupby
from typing import IO, NamedTuple, cast

from pipeline.shared.files import AnyPath
from schemas.errors import CorruptShardError, RemoteError
from schemas.shard import PLAIN

BROKEN = (tarfile.TarError, EOFError, ValueError, OverflowError)
"""What tarfile raises for bytes that are no such tar."""
NATIVE = {plain: native for native, plain in PLAIN.items()}
"""Suffix in the plain layout -> the native one."""
_LARGE = 64 << 20
"""Whether so many bytes are there at all is checked before they are read: their memory would be taken at once."""
_PROBE, _CLOSE = 1 << 18, 2 << 20
"""Bytes of a request where a sample is looked for, and how near to it the tar is read rather than halved."""


class Span(NamedTuple):
    """A file in a tar that was not read yet."""

    tar: AnyPath
    offset: int
    size: int

    def read(self) -> bytes:
        """Raises a CorruptShardError when it cannot be read."""
        with corrupt_errors(self.tar), self.tar.open("rb") as stream:
            return read(stream, self.offset, self.size)


class Sample(NamedTuple):
    """All files of one key."""

    key: str
    files: dict[str, bytes]
    """Suffix -> content."""


Wish = Callable[[str], bool | None]
"""Suffix -> True: read it; False: note where it is (a Span); None: leave it out."""


def created(stream: IO[bytes]) -> tarfile.TarFile:
    """A tar that is written to a stream, for `append`."""
    return tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT)


def append(tar: tarfile.TarFile, key: str, files: Mapping[str, bytes]) -> None:
    """Write a sample: suffix -> content, sorted, nothing of time or user. The bytes are those of webdataset's.

    Its TarWriter is not used, since the package imports torch: a second and 200 MB for each process that writes shards.
    """
    for suffix in sorted(files):
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(files[suffix])
        tar.addfile(info, BytesIO(files[suffix]))


def unpack(tar: AnyPath) -> Iterator[Sample]:
    """The samples of a tar in its order, one in memory at a time; those of the plain layout by their native names.

    Raises:
        CorruptShardError: when the tar cannot be read to its end, or holds other things than files of samples.
    """
    for key, files in samples(tar):
        yield Sample(key, cast(dict[str, bytes], files))


def unpack_one(tar: AnyPath, key: str, wish: Wish = lambda suffix: True) -> Sample | None:
    """A sample of a tar whose keys are sorted, without a walk through it: some MB are read, however large it is.

    Raises:
        CorruptShardError: when the tar cannot be read there.
    """
    with corrupt_errors(tar), tar.open("rb", _PROBE) as stream:
        low, high = 0, stream.seek(0, os.SEEK_END)
        while high - low > _CLOSE:
            middle = (low + high) // 2 // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            at, name = _next_member(stream, middle, high)
            if name and name.partition(".")[0] < key:
                low = at
            else:
                high = middle
        stream.seek(low)
        for known, files in _samples(tar, stream, 0, None, wish):
            if known >= key:
                return Sample(known, cast(dict[str, bytes], files)) if known == key else None
    return None


def _next_member(stream: IO[bytes], start: int, end: int) -> tuple[int, str]:
    """Where the first member from `start` on begins, and its name; the end and nothing where there is none."""
    stream.seek(start)
    for offset in range(start, end, tarfile.BLOCKSIZE):
        block = stream.read(tarfile.BLOCKSIZE)
        if block[257:262] == b"ustar":
            with suppress(tarfile.TarError):  # no header: its checksum is wrong
                return offset, tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape").name
    return end, ""


def samples(
    tar: AnyPath, start: int = 0, stop: int | None = None, wish: Wish = lambda suffix: True
) -> Iterator[tuple[str, dict[str, bytes | Span]]]:
    """Key, and suffix -> content, of samples [start, stop) in the order of the tar; all others are skipped by seeks.

    Raises:
        CorruptShardError: when the tar cannot be read so far, or holds other things than files of samples.
    """
    with corrupt_errors(tar), tar.open("rb") as stream:
        yield from _samples(tar, stream, start, stop, wish)


def _samples(
    tar: AnyPath, stream: IO[bytes], start: int, stop: int | None, wish: Wish
) -> Iterator[tuple[str, dict[str, bytes | Span]]]:
    for number, (key, group) in enumerate(groupby(members(stream), lambda info: info.name.partition(".")[0])):
        if number == stop:
            return
        seen: set[str] = set()
        files: dict[str, bytes | Span] = {}
        for info in group:
            _, _, suffix = info.name.partition(".")
            if not (info.isreg() and suffix):
                raise CorruptShardError(f"{tar}: {info.name} is not a file of a sample")
            suffix = NATIVE.get(suffix, suffix)
            if suffix in seen:
                raise CorruptShardError(f"{tar}: {info.name} occurs twice")
            seen.add(suffix)
            wanted = wish(suffix) if number >= start else None
            if wanted:
                files[suffix] = read(stream, info.offset_data, info.size)
            elif wanted is not None:
                files[suffix] = Span(tar, info.offset_data, info.size)
        if number >= start:
            yield key, files


@contextmanager
def corrupt_errors(tar: AnyPath) -> Iterator[None]:
    """Turn what a tar that is none raises into a `CorruptShardError` that names it."""
    try:
        yield
    except RemoteError:  # nothing is known of the file: it is not damaged
        raise
    except (*BROKEN, OSError) as error:
        raise CorruptShardError(f"{tar}: not a readable tar: {error}") from error


def members(stream: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The members of a tar in its order, from their headers alone; `stream` may be read in between.

    Raises one of `BROKEN` when a header is damaged or the tar is cut off, if only behind its last file.
    """
    with tarfile.open(fileobj=_Bounded(stream), mode="r:") as tar:  # type: ignore[call-overload]
        for info in tar:
            tar.members.clear()  # it would remember every member of the shard
            yield info
        # tarfile stops without a word at a header that is damaged or cut off.
        _require_end(stream, tar.offset)


def require_whole(stream: IO[bytes]) -> None:
    """Check the first header and the end of a tar, without a look at what lies between; raises one of `BROKEN`."""
    head = stream.read(tarfile.BLOCKSIZE)
    if head.strip(b"\0"):  # a tar without members begins with its end
        tarfile.TarInfo.frombuf(head, tarfile.ENCODING, "surrogateescape")
    _require_end(stream, max(0, stream.seek(0, os.SEEK_END) - 2 * tarfile.BLOCKSIZE))


def _require_end(stream: IO[bytes], offset: int) -> None:
    """Tars end with two blocks of zeros; some writers leave out the second."""
    stream.seek(offset)
    blocks = stream.read(2 * tarfile.BLOCKSIZE)
    if not blocks or blocks.strip(b"\0") or len(blocks) % tarfile.BLOCKSIZE:
        raise EOFError("truncated or damaged: it does not end as a tar does")


def read(stream: IO[bytes], offset: int, size: int) -> bytes:
    """The bytes of a file in a tar; an EOFError when it ends before them."""
    stream.seek(offset)
    data = _Bounded(stream).read(size)
    if len(data) != size:
        raise EOFError("unexpected end of data")
    return data


class _Bounded:
    """A stream of which no more is read at once than there is, whatever a header claims."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        if size > _LARGE:
            here = self.tell()
            left = self.seek(0, os.SEEK_END) - here
            self.seek(here)
            if size > left:
                raise EOFError("unexpected end of data")
        return self._stream.read(size)
