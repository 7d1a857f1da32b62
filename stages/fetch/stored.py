"""Images that are there already: files, members of tars, and cells of parquet files, read where they lie.

A reference is a path or fsspec URL, `#`, and what of it: `` (the file), `<offset>:<size>` (bytes of a tar), or
`<column>@<row>` (a cell; the column's name is quoted as in URLs). References are made of listings, never of names
that metadata gives. `#` alone is a file whose name cannot be written so.
"""

import errno
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from urllib.parse import quote, unquote

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from schemas.drops import Dropped, DropReason
from schemas.errors import SourceError, first_line
from schemas.unreadable import unreadable
from stages.fetch.body import Body
from stages.fetch.engine import Outcome
from stages.settings import Settings

_OF = re.compile(r"(?P<file>)|(?P<offset>[0-9]+):(?P<size>[0-9]+)|(?P<column>[^@]+)@(?P<row>[0-9]+)")
_READERS = 8
"""Parquet files that stay open: of a large one, a shard's images come in order, many calls one after the other."""
_BATCH = 16
"""Images that are decompressed together."""
_BUFFER = 4 << 20
_SCATTERED = 4
"""Files of a tar are fetched one by one where the bytes around them are so many times as many."""


def of_file(path: str) -> str:
    return f"{path}#"


def of_cell(path: str, column: str, row: int) -> str:
    """The reference of a cell; of a column of structs, `column` is dotted."""
    return f"{path}#{quote(column, safe='')}@{row}"


def read_many(paths: Sequence[str], most: int) -> Iterator[bytes | Exception]:
    """The first `most` bytes of files of one file system, or why there are none; remote ones come at the same time."""
    if not paths:
        return
    fs, _ = fsspec.core.url_to_fs(paths[0])
    inside = [fs._strip_protocol(path) for path in paths]
    for content in fs.cat_ranges(inside, [0] * len(inside), [most] * len(inside), on_error="return"):
        # What S3 answers for a range of an empty object.
        is_empty = isinstance(content, OSError) and content.errno == errno.EINVAL
        yield b"" if is_empty else content


class Stored:
    """Reads images; from one thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._columns: list[_Column] = []

    def read(self, refs: Sequence[str]) -> list[Outcome]:
        """The outcome of each reference, in their order; "" is a row without an image.

        Raises:
            SourceError: when a tar or parquet file, or the folder of a file, cannot be opened or read.
        """
        no_file, not_in_tar = Dropped(DropReason.NO_FILE), Dropped(DropReason.NOT_IN_TAR)
        outcomes: list[Outcome] = [no_file if ref == of_file("") else not_in_tar for ref in refs]
        files: dict[int, str] = {}
        inside: dict[str, list[tuple[int, int, str, int]]] = defaultdict(list)
        for index, ref in enumerate(refs):
            path, _, of = ref.rpartition("#")
            match = _OF.fullmatch(of) if path else None
            if match and match["file"] is not None:
                files[index] = path
            elif match:
                start, size = match["offset"] or match["row"], match["size"] or 0
                inside[path].append((int(start), int(size), unquote(match["column"] or ""), index))
        # In the order of each file: one pass, also over a remote one.
        members = (self._inside(path, sorted(entries)) for path, entries in inside.items())
        for index, outcome in chain(self._files(files), *members):
            outcomes[index] = outcome
        return outcomes

    def _inside(self, path: str, entries: Sequence[tuple[int, int, str, int]]) -> Iterator[tuple[int, Outcome]]:
        """The outcomes of spans of a tar, or cells of a parquet file, with their indices."""
        most = self._settings.download.max_bytes
        try:
            if entries[0][2]:
                for row, _, column, index in entries:
                    yield index, self._outcome(self._cell(path, column, row), None)
                return
            fs, inside = fsspec.core.url_to_fs(path)
            # Of a store no more is read ahead than is wanted: by itself S3's file system reads 50 MB.
            span, wanted = entries[-1][0] - entries[0][0], sum(size for _, size, _, _ in entries[:-1])
            ahead = {"block_size": min(span, _BUFFER)} if 0 < span < _SCATTERED * wanted else {"cache_type": "none"}
            with fs.open(inside, "rb", **ahead) as tar:
                for offset, size, _, index in entries:
                    tar.seek(offset)
                    data = tar.read(size) if size <= most else b""  # its size alone drops it
                    is_cut_off = size <= most and len(data) != size  # with the tar, whose writer was killed
                    yield index, self._outcome(None if is_cut_off else data, size)
        except (*unreadable(), KeyError) as error:  # type: ignore[misc]  # it cannot tell what a star brings
            raise SourceError(
                f"{path} cannot be read ({first_line(error)}): restore the existing download, or fetch anew."
            ) from error

    def _files(self, paths: dict[int, str]) -> Iterator[tuple[int, Outcome]]:
        """The outcomes of whole files, with their indices; a remote file system fetches them at the same time."""
        contents = read_many(list(paths.values()), self._settings.download.max_bytes + 1)
        for (index, path), content in zip(paths.items(), contents, strict=True):
            # Trouble with one file, unless all that lies beside it is gone (a disk that is not mounted); a store that
            # refuses one refuses all.
            if isinstance(content, bytes):
                yield index, self._outcome(content, len(content))
                continue
            fs, inside = fsspec.core.url_to_fs(path)
            gone = isinstance(content, FileNotFoundError | IsADirectoryError)
            closed = isinstance(content, PermissionError) and isinstance(fs, LocalFileSystem)
            if not ((gone or closed) and fs.isdir(fs._parent(inside))):
                raise SourceError(f"{path} cannot be read: {first_line(content)}") from content
            yield index, Dropped(DropReason.NO_FILE)

    def _outcome(self, data: bytes | None, size: int | None) -> Outcome:
        if data is None:
            return Dropped(DropReason.NOT_IN_TAR)
        body = Body(self._settings)
        try:
            body.announce(size)
            body.feed(data)
            return body.finish()
        except Dropped as dropped:
            return dropped

    def _cell(self, path: str, column: str, row: int) -> bytes | None:
        """The bytes of a cell, by the open column that comes to it soonest."""
        fitting = (one for one in self._columns if one.name == (path, column) and one.is_just_before(row))
        chosen = max(fitting, key=lambda one: one.start, default=None)
        if chosen is not None:
            self._columns.remove(chosen)
        else:
            if len(self._columns) == _READERS:
                self._columns.pop(0).close()
            chosen = _Column(path, column, row)
        try:
            value = chosen.value(row)
        except BaseException:  # from now on it would have no rows
            chosen.close()
            raise
        self._columns.append(chosen)
        return value

    def close(self) -> None:
        while self._columns:
            self._columns.pop().close()


class _Column:
    """A column of a parquet file that is read forwards, through small buffers: a row group may hold gigabytes."""

    def __init__(self, path: str, column: str, row: int) -> None:
        self.name = path, column
        self._file = fsspec.open(path, "rb").open()
        self._parquet = pq.ParquetFile(self._file, pre_buffer=False, buffer_size=_BUFFER)
        groups = self._parquet.metadata
        self._groups = np.cumsum([0, *(groups.row_group(number).num_rows for number in range(groups.num_row_groups))])
        group = self._group_of(row)
        self.start = self._end = int(self._groups[group])
        self._batches = self._parquet.iter_batches(
            _BATCH, row_groups=range(group, groups.num_row_groups), columns=[column], use_threads=False
        )
        self._batch = pa.array([])

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self._groups, row, "right")) - 1

    def is_just_before(self, row: int) -> bool:
        """Whether it comes to a row sooner than one that begins at the row's group."""
        return self.start <= row and self._group_of(row) <= self._group_of(self._end)

    def value(self, row: int) -> bytes | None:
        """The bytes at a row; None where there are none."""
        while row >= self._end:
            batch = next(self._batches, None)
            if batch is None:
                return None
            self._batch = batch.column(0)
            self.start, self._end = self._end, self._end + len(self._batch)
        value = self._batch[row - self.start].as_py()
        while isinstance(value, dict):
            value = next(iter(value.values()))
        return value.encode() if isinstance(value, str) else value

    def close(self) -> None:
        self._parquet.close()
        self._file.close()
