"""Tars to undecoded samples: only the files that are asked for are read, all others are skipped by a seek."""

import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

from webdataset.tariterators import base_plus_ext, group_by_keys

from pipeline.shared.files import AnyPath
from schemas.errors import CorruptShardError

_BROKEN = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError)
"""What tarfile raises for bytes that are no such tar."""
_REQUIRED = "json"
_LARGE = 64 << 20
"""Whether so many bytes are there at all is asked before they are read: their memory would be taken at once."""


class Shard(NamedTuple):
    """A finished shard that holds samples."""

    folder: str
    """The dataset's folder, as it was given."""
    name: str
    tar: AnyPath
    kept: int
    """Samples in it."""


class Span(NamedTuple):
    """A file that was not read yet."""

    tar: AnyPath
    offset: int
    size: int

    def read(self) -> bytes:
        """Read it now."""
        with self.tar.open("rb") as stream:
            return _read(stream, self)


class Raw(NamedTuple):
    """The files of one sample, undecoded."""

    shard: Shard
    key: str
    files: dict[str, bytes | Span]
    """Suffix -> content."""

    def content(self, suffix: str) -> bytes:
        """One file.

        Raises:
            CorruptShardError: when the sample lacks it; names shard and key.
        """
        if suffix not in self.files:
            raise self.corrupt(suffix, "is missing")
        found = self.files[suffix]
        if isinstance(found, bytes):
            return found
        with _translated(self.shard):
            return found.read()

    def corrupt(self, suffix: str, reason: str) -> CorruptShardError:
        """The error of a damaged file."""
        return CorruptShardError(f"{self.shard.tar}: {self.key}.{suffix} {reason}")


Wish = Callable[[str], bool | None]
"""Suffix -> True: read it; False: note where it is (a Span); None: leave it out."""


def samples(shard: Shard, start: int, stop: int, wish: Wish) -> Iterator[Raw]:
    """Samples [start, stop) of a shard; a range that ends with the shard must be followed by nothing.

    Raises:
        CorruptShardError: when the tar cannot be read so far, a sample has no json or a file twice, or there are more
            or fewer samples than the manifest says; names the shard, and the key where known.
    """
    count = 0
    with _translated(shard), shard.tar.open("rb") as stream:
        for sample in group_by_keys(_files(shard, stream, start, stop, wish)):
            key, _ = sample.pop("__key__"), sample.pop("__url__")
            count += 1
            yield Raw(shard, key, sample)
    if count != stop - start:
        raise CorruptShardError(f"{shard.tar}: ends after {start + count} samples, its manifest says {shard.kept}")


def _files(shard: Shard, stream: BinaryIO, start: int, stop: int, wish: Wish) -> Iterator[dict[str, Any]]:
    """Files of samples [start, stop), as webdataset's group_by_keys takes them."""
    number, current, seen = -1, "", {_REQUIRED}
    for info in _members(stream):
        key, suffix = base_plus_ext(info.name)
        if key != current:
            _check_json(shard, current, seen)
            number, current, seen = number + 1, key, set()
            if number >= stop:
                break
        if key is None or not info.isreg() or suffix in seen:
            raise CorruptShardError(f"{shard.tar}: {info.name} is not a file of a sample, or occurs twice")
        seen.add(suffix)
        if number >= start and (wanted := wish(suffix)) is not None:
            span = Span(shard.tar, info.offset_data, info.size)
            yield {"fname": info.name, "data": _read(stream, span) if wanted else span, "__url__": str(shard.tar)}
    else:
        _check_json(shard, current, seen)
    if number >= stop == shard.kept:
        raise CorruptShardError(f"{shard.tar}: holds more samples than the {shard.kept} that its manifest says")


def _members(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for info in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # it would remember every member of the shard
            yield info


def _read(stream: BinaryIO, span: Span) -> bytes:
    if span.size > _LARGE and span.size > stream.seek(0, os.SEEK_END) - span.offset:
        raise EOFError("unexpected end of data")
    stream.seek(span.offset)
    data = stream.read(span.size)
    if len(data) != span.size:
        raise EOFError("unexpected end of data")
    return data


def _check_json(shard: Shard, key: str, seen: set[str]) -> None:
    if _REQUIRED not in seen:
        raise CorruptShardError(f"{shard.tar}: {key}.{_REQUIRED} is missing")


@contextmanager
def _translated(shard: Shard) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise CorruptShardError(f"{shard.tar}: not a readable tar: {error}") from error
