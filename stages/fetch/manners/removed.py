"""Lists of URLs and files that must not be used: take-downs, opt-outs that were made elsewhere, known bad files."""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import SourceError
from schemas.urls import identity

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_URL = re.compile(r"https?://", re.IGNORECASE)
_ROWS = 100_000


class Removed:
    """The URLs and sha256 of some lists, as hashes of 8 bytes: a list of a million lines takes 8 MB."""

    def __init__(self, paths: Sequence[str]) -> None:
        """Read the lists: text (a line each), CSV, or parquet; cells that are neither URL nor sha256 are passed over.

        Raises:
            SourceError: when one cannot be read, or holds no URL and no sha256 at all.
        """
        hashes = [_hashes(path) for path in paths]
        self._hashes = np.unique(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)

    def __bool__(self) -> bool:
        """Whether anything is removed."""
        return len(self._hashes) > 0

    def has_url(self, text: str | None) -> bool:
        """Whether this URL is on a list, however it is written."""
        return text is not None and self._has(identity(text))

    def has_sha256(self, digest: str) -> bool:
        """Whether a file of this sha256 (hex, lower case) is on a list."""
        return self._has(digest)

    def _has(self, text: str) -> bool:
        wanted = _hash(text)
        place = int(np.searchsorted(self._hashes, wanted))
        return place < len(self._hashes) and bool(self._hashes[place] == wanted)


def _hashes(path: str) -> np.ndarray:
    try:
        found = np.fromiter(map(_hash, _entries(_cells(path))), np.uint64)
    except (OSError, csv.Error, pa.ArrowException, UnicodeError) as error:
        raise _unreadable(path, error) from error
    if not len(found):
        raise SourceError(f"The list {path} of download.removed holds neither a URL nor a sha256.")
    return found


def _unreadable(path: str, error: Exception) -> SourceError:
    return SourceError(f"The list {path} of download.removed cannot be read: {error}.")


def _entries(cells: Iterable[str]) -> Iterator[str]:
    for cell in cells:
        text = cell.strip()
        if _SHA256.fullmatch(text):
            yield text.lower()
        elif _URL.match(text):
            yield identity(text)


def _cells(path: str) -> Iterator[str]:
    if path.lower().endswith(".parquet"):
        yield from _parquet_cells(path)
        return
    with fsspec.open(path, "rt", compression="infer", encoding="utf-8-sig", newline="") as file:
        if ".csv" in path.lower().rpartition("/")[2]:
            for row in csv.reader(file):
                yield from row
        else:
            yield from file


def _parquet_cells(path: str) -> Iterator[str]:
    with fsspec.open(path, "rb") as file, pq.ParquetFile(file) as parquet:
        fields = [field for field in parquet.schema_arrow if field.type in (pa.string(), pa.large_string())]
        for batch in parquet.iter_batches(batch_size=_ROWS, columns=[field.name for field in fields]):
            for column in batch.columns:
                yield from (cell for cell in column.to_pylist() if cell is not None)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
