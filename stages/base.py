"""The Stage protocol, and what row-wise stages share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import pyarrow as pa

from schemas.columns import COLUMNS
from schemas.drops import Dropped, DropReason
from stages.runtime import Runtime
from stages.settings import Settings

DROP = "drop"
"""The column in which a stage says why a row is dropped; null for rows that live on."""


class Stage(Protocol):
    """One step of the pipeline: 1:1 in rows, same order.

    The runner hands a stage exactly the columns that it `reads` (of living rows only, one at least), and accepts
    exactly `writes`, and `DROP` if it declares `drops`. A dropped row keeps the ledger columns that were written for
    it; the others may be null. Foreseen trouble with one image is a drop; anything else raises and stops the shard.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    writes: ClassVar[tuple[str, ...]]
    drops: ClassVar[tuple[DropReason, ...]]

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        """Load what the stage needs (models too); runs on the worker, once per process."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return `writes` (and `DROP`) for the rows of `table`, in its order."""


class Record(Mapping[str, Any]):
    """A row of a table. A column becomes a Python value when it is looked at, which for an image file is rare."""

    def __init__(self, columns: Mapping[str, pa.ChunkedArray], index: int) -> None:
        self._columns, self._index = columns, index

    def __getitem__(self, name: str) -> Any:
        return self._columns[name][self._index].as_py()

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def records(table: pa.Table) -> list[Record]:
    columns = dict(zip(table.column_names, table.columns, strict=True))
    return [Record(columns, index) for index in range(table.num_rows)]


class RowStage(Stage):
    """A stage that works row by row: subclasses write `row`, and raise `Dropped` to drop."""

    drops: ClassVar[tuple[DropReason, ...]] = ()

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self.settings = settings

    def row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The written columns of one record (its read columns as Python values); may raise `Dropped`."""
        raise TypeError(f"{type(self).__name__} does not define row()")

    def __call__(self, table: pa.Table) -> pa.Table:
        return to_table([_or_drop(self.row, record) for record in records(table)], self)


class BatchStage(RowStage):
    """A row stage whose model takes what it needs of several rows at once: `batch` of them, where that is worth it."""

    batch: int = 1

    def given(self, record: Mapping[str, Any]) -> Any:
        """What the model takes of one record; may raise `Dropped`."""
        raise TypeError(f"{type(self).__name__} does not define given()")

    def computed(self, given: Sequence[Any]) -> Sequence[Any]:
        raise TypeError(f"{type(self).__name__} does not define computed()")

    def written(self, record: Mapping[str, Any], output: Any) -> dict[str, Any]:
        """The written columns of one record, from what was computed for it; may raise `Dropped`."""
        raise TypeError(f"{type(self).__name__} does not define written()")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Compute batch by batch; a row that is dropped changes nothing for the others."""
        rows: list[dict[str, Any]] = []
        everything = records(table)
        for start in range(0, len(everything), self.batch):
            batch = everything[start : start + self.batch]
            given: dict[int, Any] = {}
            made: list[dict[str, Any]] = [{} for _ in batch]
            for i, record in enumerate(batch):
                try:
                    given[i] = self.given(record)
                except Dropped as dropped:
                    made[i] = {**dropped.measured, DROP: dropped.reason}
            for i, output in zip(given, self.computed(list(given.values())), strict=True):
                made[i] = _or_drop(self.written, batch[i], output)
            rows += made
        return to_table(rows, self)


def _or_drop(row: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    try:
        return row(*given)
    except Dropped as dropped:
        return {**dropped.measured, DROP: dropped.reason}


def to_table(rows: list[dict[str, Any]], stage: Stage) -> pa.Table:
    """Rows of Python values as a table of what a stage writes (and `DROP` if it can drop); absent values are null."""
    columns = {name: pa.array([row.get(name) for row in rows], COLUMNS[name].type) for name in stage.writes}
    if stage.drops:
        columns[DROP] = pa.array([row.get(DROP) for row in rows], pa.string())
    return pa.table(columns)
