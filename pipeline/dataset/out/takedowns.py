"""What must not be used: what OUT is to forget, and what is on the lists of `download.removed`.

Rows of either become tombstones that hold nothing but key, part, row, verdict and stage. Whoever writes to OUT asks
here: runs before and after they fetch, and `finished.forget` for shards that are done.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from io import TextIOWrapper
from itertools import chain
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.out.forgotten import Forgotten
from pipeline.dataset.rows import Rows, tombstones
from pipeline.shared.files import open_binary, reading
from schemas.arrays import Hashes, Mask
from schemas.columns import COLUMNS
from schemas.digest import sha256
from schemas.drops import DropReason
from schemas.errors import SourceError
from schemas.urls import identity
from stages.metadata import Metadata

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_URL = re.compile(r"https?://", re.IGNORECASE)
_ROWS = 100_000


class Listed:
    """The URLs and sha256 of some lists, as hashes of 8 bytes: a list of a million lines takes 8 MB."""

    def __init__(self, paths: Sequence[str] = ()) -> None:
        """Read the lists; lines and cells that are neither URL nor sha256 are passed over."""
        hashes = [np.empty(0, np.uint64)]
        for path in paths:
            forms = (identity(text) if kind == "url" else text for kind, text in entries(path) if kind != "other")
            hashes.append(short_hashes(forms))
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
        given = list(forms)
        wanted = short_hashes(form or "" for form in given)
        at = np.minimum(np.searchsorted(self.hashes, wanted), len(self.hashes) - 1)
        mask: Mask = (self.hashes[at] == wanted) & np.array([form is not None for form in given], bool)
        return mask


def entries(path: str) -> Iterator[tuple[Literal["url", "sha256", "other"], str]]:
    """The cells of a text file's lines, between tabs (empty ones and `#` are skipped), of a CSV or parquet file.

    Those that end with `.gz` too. Semicolons separate the cells of a CSV whose first line names its columns so.
    """
    name = path.lower().rpartition("/")[2]
    with reading(f"The list {path}"):
        if name.endswith(".parquet"):
            with open_binary(path) as file, pq.ParquetFile(file) as parquet:
                texts = [field.name for field in parquet.schema_arrow if _is_text(field.type)]
                for batch in parquet.iter_batches(batch_size=_ROWS, columns=texts):
                    for column in batch.columns:
                        yield from map(_entry, filter(None, column.to_pylist()))
            return
        with TextIOWrapper(open_binary(path, "infer"), encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            lines, separator = chain([first], file), "\t"
            if ".csv" in name:
                is_of_semicolons = ";" in first and "," not in first and _entry(first)[0] == "other"
                separator = ";" if is_of_semicolons else ","
            is_table = ".csv" in name or ".tsv" in name
            cells = csv.reader(lines, delimiter=separator) if is_table else (line.split(separator) for line in lines)
            yield from (_entry(cell) for cell in chain.from_iterable(cells) if cell.strip()[:1] not in ("", "#"))


def _is_text(type: pa.DataType) -> bool:
    plain = type.value_type if pa.types.is_dictionary(type) else type
    return plain in (pa.string(), pa.large_string(), pa.string_view())


def _entry(cell: str) -> tuple[Literal["url", "sha256", "other"], str]:
    text = cell.strip()
    if _SHA256.fullmatch(text):
        return "sha256", text.lower()
    return ("url" if _URL.match(text) else "other"), text


def short_hashes(texts: Iterable[str]) -> Hashes:
    """Of eight bytes each: a list or a part has millions of URLs."""
    digests = (blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), np.uint64)


DROPS = (DropReason.FORGOTTEN, DropReason.REMOVED)
"""The reasons that are given here, and by no stage: OUT and the lists of its run decide, not the row alone."""
KEEPS = ("key", "part", "row", "verdict", "stage")
"""The ledger columns of such a row that are not null."""
STAGE = Metadata.name
"""Where the funnel counts such rows, whatever became of them before: ahead of any download."""


@dataclass(frozen=True)
class Takedowns:
    forgotten: Forgotten = field(default_factory=Forgotten)
    listed: Listed = field(default_factory=Listed)

    def __bool__(self) -> bool:
        return bool(self.forgotten or self.listed)

    def reasons(self, table: pa.Table) -> pa.Array:
        """Why each row of a table of seed or ledger columns must not be used; null for all others."""
        reasons = np.full(table.num_rows, None, dtype=object)
        reasons[self.listed.rows_in(table)] = DropReason.REMOVED.value
        reasons[self.forgotten.rows_in(table)] = DropReason.FORGOTTEN.value
        return pa.array(reasons, pa.string())

    def judged(self, seeds: pa.Table) -> pa.Table:
        """Judged seed rows, of which those that must not be used are so, whatever else the metadata made of them."""
        return blank(seeds, self.reasons(seeds)) if self else seeds

    def without_contents(self, batches: Iterator[Rows]) -> Iterator[Rows]:
        """Fetched batches, in which files that must not be used came from yet another URL."""
        if not self:
            yield from batches
            return
        for rows in batches:
            alive, dead = self.reasons(rows.alive), self.reasons(rows.dead)
            if alive.null_count == len(alive) and dead.null_count == len(dead):
                yield rows
                continue
            fallen, why = rows.alive.filter(pc.is_valid(alive)), alive.drop_null()
            keys = [*fallen["key"].to_pylist(), *rows.dead["key"].filter(pc.is_valid(dead)).to_pylist()]
            yield replace(
                rows,
                alive=rows.alive.filter(pc.is_null(alive)),
                dead=pa.concat_tables([blank(rows.dead, dead), blank(tombstones(fallen, why, STAGE), why)]),
                witnesses=rows.witnesses.filter(
                    pc.invert(pc.is_in(rows.witnesses["key"], pa.array(keys, pa.string())))
                ),
            )


def blank(table: pa.Table, reasons: pa.Array) -> pa.Table:
    """A table of ledger or seed columns, whose rows with a reason became tombstones that tell nothing else."""
    if reasons.null_count == len(reasons):
        return table
    fallen = pc.is_valid(reasons)
    columns = []
    for name in table.column_names:
        column = table[name]
        if name == "verdict":
            column = pc.if_else(fallen, reasons, column)
        elif name == "stage":
            column = pc.if_else(fallen, pa.scalar(STAGE, COLUMNS[name].type), column)
        elif name not in KEEPS:
            column = pc.if_else(fallen, pa.scalar(None, column.type), column)
        columns.append(column)
    return pa.table(columns, schema=table.schema)
