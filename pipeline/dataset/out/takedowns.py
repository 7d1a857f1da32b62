"""What must not be used: what OUT is to forget, and what is on the lists of `download.removed`.

Rows of either become tombstones that hold nothing but key, part, row, verdict and stage. Whoever writes to OUT asks
here: runs before and after they fetch, and `finished.forget` for shards that are done.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.out.forgotten import Forgotten
from pipeline.dataset.out.lists import Listed
from pipeline.dataset.rows import Rows, tombstones
from schemas.columns import COLUMNS
from schemas.drops import DropReason
from stages.metadata import Metadata

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
    # take() with null indices: if_else knows no lists of fixed size
    others = pa.array(np.arange(len(reasons)), mask=fallen.to_numpy(zero_copy_only=False))
    columns = []
    for name in table.column_names:
        column = table[name]
        if name == "verdict":
            column = pc.if_else(fallen, reasons, column)
        elif name == "stage":
            column = pc.if_else(fallen, pa.scalar(STAGE, COLUMNS[name].type), column)
        elif name not in KEEPS:
            column = column.combine_chunks().take(others)
        columns.append(column)
    return pa.table(columns, schema=table.schema)
