"""Published tars back to samples, one at a time."""

import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from schemas.errors import CorruptShardError

_READ_BYTES = 2**20
_BROKEN = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError)
"""What tarfile raises for bytes that are no such tar."""


class Sample(NamedTuple):
    """All files of one key."""

    key: str
    files: dict[str, bytes]
    """Suffix -> content."""


class _File(NamedTuple):
    key: str
    suffix: str
    data: bytes


def unpack(path: Path) -> Iterator[Sample]:
    """The samples of a tar in its order; names are split at the first dot, as webdataset does. One in memory at a time.

    Raises:
        CorruptShardError: when the tar cannot be read to its end, or holds other things than a sample's files.
    """
    for key, files in groupby(_files(path), lambda file: file.key):
        found: dict[str, bytes] = {}
        for file in files:
            if file.suffix in found:
                raise CorruptShardError(f"{path.name}: {key}.{file.suffix} occurs twice")
            found[file.suffix] = file.data
        yield Sample(key, found)


def _files(path: Path) -> Iterator[_File]:
    try:
        with tarfile.open(path, "r|", bufsize=_READ_BYTES) as tar:
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember every member of the shard
                stream = tar.extractfile(info) if info.isreg() else None
                if stream is None:
                    raise CorruptShardError(f"{path.name}: {info.name} is not a file")
                key, _, suffix = info.name.partition(".")
                yield _File(key, suffix, stream.read())
    except _BROKEN as error:
        raise CorruptShardError(f"{path.name}: not a readable tar: {error}") from error
