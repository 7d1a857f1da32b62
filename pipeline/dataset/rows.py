"""The rows of a batch between stages: the living with their payload, the dropped as tombstones."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from schemas.columns import COLUMNS, LEDGER, LEDGER_SCHEMA, SEED

WITNESS_SCHEMA = pa.schema([("key", pa.string()), ("verdict", pa.string()), ("image", pa.binary())])
"""Photos of a few dropped rows, for the report alone."""
NO_WITNESSES = WITNESS_SCHEMA.empty_table()
_NONE_DEAD = LEDGER_SCHEMA.empty_table()


@dataclass(frozen=True)
class Rows:
    """The records of a batch: the living with their payload, the dropped as tombstones."""

    alive: pa.Table
    dead: pa.Table
    """LEDGER columns."""
    witnesses: pa.Table
    microseconds: Counter[str] = field(default_factory=Counter)
    """Stage -> time that it spent on these rows."""

    @staticmethod
    def living(table: pa.Table) -> "Rows":
        """Rows of which none was dropped yet."""
        return Rows(table, _NONE_DEAD, NO_WITNESSES)

    @staticmethod
    def joined(batches: "Sequence[Rows]") -> "Rows":
        return Rows(
            pa.concat_tables([rows.alive for rows in batches]),
            pa.concat_tables([rows.dead for rows in batches]),
            pa.concat_tables([rows.witnesses for rows in batches]),
            sum((rows.microseconds for rows in batches), Counter()),
        )

    def split(self, count: int) -> "tuple[Rows, Rows]":
        """The first `count` living rows with all that was dropped, and the further living rows; nothing is copied."""
        first, rest = self.alive.slice(0, count), self.alive.slice(count)
        return replace(self, alive=first), Rows.living(rest)

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process as Arrow streams: Ray pickles each array of a table, which takes 20 times as long.

        Payload may stay in shared memory there. The ledger's columns, which the writer holds until the shard is done,
        go as bytes, which are copied out: a column that lies there holds on to its whole batch.
        """
        measured = [name for name in self.alive.column_names if COLUMNS[name].ledger]
        held = [_stream(table.combine_chunks()).to_pybytes() for table in (self.alive.select(measured), self.dead)]
        payload = [_stream(table) for table in (self.alive.drop_columns(measured), self.witnesses)]
        return _received, (self.alive.column_names, *held, *payload, self.microseconds)

    def timed(self, stage: str, seconds: float) -> "Rows":
        return replace(self, microseconds=self.microseconds + Counter({stage: round(1e6 * seconds)}))


def _stream(table: pa.Table) -> pa.Buffer:
    """A table in Arrow's format for streams; a slice goes without the rest of its batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def _received(names: Sequence[str], *sent: Any) -> Rows:
    measured, dead, payload, witnesses = (pa.ipc.open_stream(one).read_all() for one in sent[:4])
    columns = {column: table[column] for table in (measured, payload) for column in table.column_names}
    return Rows(pa.table({name: columns[name] for name in names}), dead, witnesses, sent[4])


def split_seeds(seeds: pa.Table) -> Rows:
    """Judged seed rows as living rows and tombstones."""
    alive = pc.is_null(seeds.column("verdict"))
    dead = seeds.filter(pc.invert(alive))
    return Rows(seeds.filter(alive).select(list(SEED)), _as_ledger(dead), NO_WITNESSES)


def tombstones(rows: pa.Table, verdicts: pa.Array, stage: str) -> pa.Table:
    """Rows as ledger rows: the measurements so far, the verdict, and the stage that gave it; no payload."""
    rows = put(rows, "verdict", verdicts)
    return _as_ledger(put(rows, "stage", pa.array([stage] * rows.num_rows, pa.string())))


def _as_ledger(rows: pa.Table) -> pa.Table:
    known = set(rows.column_names)
    arrays = [rows.column(name) if name in known else pa.nulls(rows.num_rows, COLUMNS[name].type) for name in LEDGER]
    return pa.table(arrays, schema=LEDGER_SCHEMA)


def put(table: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, values)
    return table.append_column(name, values)
