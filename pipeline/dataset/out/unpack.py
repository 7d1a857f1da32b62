"""Published tars back to samples, one at a time; of damaged ones, what is left."""

import os
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import IO, NamedTuple

from pipeline.shared.files import AnyPath
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


def unpack(path: AnyPath) -> Iterator[Sample]:
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


def _files(path: AnyPath) -> Iterator[_File]:
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r|", bufsize=_READ_BYTES) as tar:
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember every member of the shard
                file = tar.extractfile(info) if info.isreg() else None
                if file is None:
                    raise CorruptShardError(f"{path.name}: {info.name} is not a file")
                key, _, suffix = info.name.partition(".")
                yield _File(key, suffix, file.read())
    except _BROKEN as error:
        raise CorruptShardError(f"{path.name}: not a readable tar: {error}") from error


class Remains(NamedTuple):
    """The files of one key that lie together in a damaged tar."""

    key: str
    files: dict[str, bytes]
    clean: bool
    """Whether nothing but zeros fills their last blocks."""


def salvage(path: AnyPath) -> Iterator[Remains]:
    """Whatever files can be found in a tar whose bytes were changed; a file whose header is damaged is passed over.

    Raises:
        OSError: when it cannot be read.
    """
    with path.open("rb") as stream:
        for key, members in groupby(_members(stream), lambda member: member.name.partition(".")[0]):
            found = list(members)
            files = {member.name.partition(".")[2]: member.data for member in found}
            yield Remains(key, files, all(member.clean for member in found))


class _Member(NamedTuple):
    name: str
    data: bytes
    clean: bool


def _members(tar: IO[bytes]) -> Iterator[_Member]:
    """Each file whose header is whole; between two of them, block after block is tried."""
    name, clean = "", True
    whole = tar.seek(0, os.SEEK_END)
    tar.seek(0)
    while len(block := tar.read(tarfile.BLOCKSIZE)) == tarfile.BLOCKSIZE:
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            continue
        data = tar.read(min(max(info.size, 0), whole - tar.tell()))  # as much memory as is asked for is taken at once
        padding = bytes(-len(data) % tarfile.BLOCKSIZE)
        clean = tar.read(len(padding)) == padding and len(data) == info.size and clean
        if info.type == tarfile.XHDTYPE:  # it holds the next file's name, where that is a long one
            name = _long_name(data)
            continue
        yield _Member(name or info.name, data, clean)
        name, clean = "", True


def _long_name(header: bytes) -> str:
    found = re.search(rb"\d+ path=([^\n]*)\n", header)
    return found[1].decode("utf-8", "surrogateescape") if found else ""
