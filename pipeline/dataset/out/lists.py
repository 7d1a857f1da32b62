"""Lists of what must not be used, as `download.removed` and `forget --list` name them: URLs, sha256 of files, sites."""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from io import TextIOWrapper
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shared.files import open_binary, reading
from schemas.digest import sha256
from schemas.errors import SourceError
from schemas.urls import identity

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_URL = re.compile(r"https?://", re.IGNORECASE)
_ROWS = 100_000

Mask = npt.NDArray[np.bool_]


class Listed:
    """The URLs and sha256 of some lists, as hashes of 8 bytes: a list of a million lines takes 8 MB."""

    def __init__(self, paths: Sequence[str] = ()) -> None:
        """Read the lists; lines and cells that are neither URL nor sha256 are passed over.

        Raises:
            SourceError: when one cannot be read, or holds no URL and no sha256 at all.
        """
        hashes = [np.empty(0, np.uint64)]
        for path in paths:
            forms = (identity(text) if kind == "url" else text for kind, text in entries(path) if kind != "other")
            hashes.append(np.fromiter(map(_hash, forms), np.uint64))
            if not len(hashes[-1]):
                raise SourceError(f"The list {path} of download.removed holds neither a URL nor a sha256.")
        self.hashes = np.unique(np.concatenate(hashes))

    def __bool__(self) -> bool:
        return len(self.hashes) > 0

    @cached_property
    def digest(self) -> str:
        """The sha256 of what is listed, in whatever files and order; empty where nothing is."""
        return sha256(self.hashes.tobytes()) if self else ""

    def rows_in(self, table: pa.Table) -> Mask:
        """Which rows of a table of ledger or seed columns have a URL or file that is listed."""
        if not self:
            return np.zeros(table.num_rows, bool)
        mask = self._contains(identity(url) if url else None for url in table["url"].to_pylist())
        if "sha256" in table.column_names:
            mask |= self._contains(table["sha256"].to_pylist())
        return mask

    def _contains(self, forms: Iterable[str | None]) -> Mask:
        hashes = [None if form is None else _hash(form) for form in forms]
        wanted = np.array([one or 0 for one in hashes], np.uint64)
        at = np.minimum(np.searchsorted(self.hashes, wanted), len(self.hashes) - 1)
        mask: Mask = (self.hashes[at] == wanted) & np.array([one is not None for one in hashes], bool)
        return mask


def entries(path: str) -> Iterator[tuple[Literal["url", "sha256", "other"], str]]:
    """The lines of a text file (empty ones and `#` are skipped), or the cells of a CSV or parquet file; `.gz` too.

    Raises:
        SourceError: when it cannot be read.
    """
    name = path.lower().rpartition("/")[2]
    with reading(f"The list {path}"):
        if name.endswith(".parquet"):
            with open_binary(path) as file, pq.ParquetFile(file) as parquet:
                texts = [field.name for field in parquet.schema_arrow if field.type in (pa.string(), pa.large_string())]
                for batch in parquet.iter_batches(batch_size=_ROWS, columns=texts):
                    for column in batch.columns:
                        yield from map(_entry, filter(None, column.to_pylist()))
            return
        with TextIOWrapper(open_binary(path, "infer"), encoding="utf-8-sig", newline="") as file:
            cells = chain.from_iterable(csv.reader(file)) if ".csv" in name else file
            yield from (_entry(cell) for cell in cells if cell.strip() and not cell.lstrip().startswith("#"))


def _entry(cell: str) -> tuple[Literal["url", "sha256", "other"], str]:
    text = cell.strip()
    if _SHA256.fullmatch(text):
        return "sha256", text.lower()
    return ("url" if _URL.match(text) else "other"), text


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
