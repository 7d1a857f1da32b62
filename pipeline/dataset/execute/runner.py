"""Where a stage meets data: projection in, contract checks out, tombstones for dropped rows. Nowhere else."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.rows import Rows, put, tombstones
from schemas.columns import COLUMNS, schema
from schemas.errors import ContractError
from schemas.record import check, check_filled
from stages.base import DROP, Stage


@dataclass(frozen=True)
class Loaded:
    """A stage that was loaded on this worker, and the columns that anything after it still needs."""

    stage: Stage
    keep: frozenset[str]


def apply(step: Loaded, rows: Rows) -> Rows:
    """Run one stage on the living rows; its drops become tombstones, and columns nobody needs any more are let go."""
    begun = time.perf_counter()
    result = step.stage(rows.alive.select(list(step.stage.reads))) if rows.alive.num_rows else None
    return _applied(step, rows, result).timed(step.stage.name, time.perf_counter() - begun)


def apply_ahead(step: Loaded, batches: Iterator[Rows], most_rows: int) -> Iterator[Rows]:
    """Run a stage that has a `stream` on batch after batch: it begins up to `most_rows` rows before their turn.

    Its time is what was waited for it.
    """
    waiting: deque[Rows] = deque()

    def tables() -> Iterator[pa.Table]:
        for rows in batches:
            waiting.append(rows)
            yield rows.alive.select(list(step.stage.reads))

    results = step.stage.stream(tables(), most_rows)  # type: ignore[attr-defined]
    while True:
        begun = time.perf_counter()
        result = next(results, None)
        if result is None:
            return
        yield _applied(step, waiting.popleft(), result).timed(step.stage.name, time.perf_counter() - begun)


def _applied(step: Loaded, rows: Rows, result: pa.Table | None) -> Rows:
    stage, alive = step.stage, rows.alive
    if alive.num_rows == 0 or result is None:
        return replace(rows, alive=_empty(step.keep & {*alive.column_names, *stage.writes}))
    written, drop = checked(stage, alive, result)
    columns = {column.name: alive[column.name] for column in alive.schema} | {n: written[n] for n in stage.writes}
    keep = [name for name in COLUMNS if name in step.keep and name in columns]
    alive, dead, witnesses = pa.table(columns), rows.dead, rows.witnesses
    survivors = alive
    if drop.null_count < len(drop):  # what is filtered is copied: only where rows fall, and only what is needed of them
        dropped = pc.is_valid(drop)
        used = {*keep, *stage.writes}
        needed = [name for name in columns if name in used]
        survivors = alive.select(needed).filter(pc.invert(dropped))
        fallen = alive.select([name for name in columns if COLUMNS[name].ledger]).filter(dropped)
        dead = pa.concat_tables([dead, tombstones(fallen, drop.drop_null(), stage.name)])
        witnesses = _witnesses(witnesses, alive, drop)
    check_filled(survivors, stage.writes, stage.name)
    return replace(rows, alive=survivors.select(keep), dead=dead, witnesses=witnesses)


@cache
def _empty(names: frozenset[str]) -> pa.Table:
    return schema(tuple(name for name in COLUMNS if name in names)).empty_table()


def apply_all(steps: Sequence[Loaded], rows: Rows) -> Rows:
    for step in steps:
        rows = apply(step, rows)
    return rows


def checked(stage: Stage, table: pa.Table, result: pa.Table) -> tuple[pa.Table, pa.Array]:
    """Check what a stage made of a table.

    Returns:
        The written columns, and per row the reason of its drop or null.

    Raises:
        ContractError: when the stage breaks its declaration.
    """
    if result.num_rows != table.num_rows:
        raise ContractError(f"{stage.name}: {table.num_rows} rows in, {result.num_rows} rows out")
    drop = pa.nulls(result.num_rows, pa.string())
    if stage.drops:
        drop = result.column(DROP).combine_chunks()
        undeclared = set(pc.unique(drop).to_pylist()) - set(stage.drops) - {None}
        if undeclared:
            raise ContractError(f"{stage.name}: dropped rows for undeclared reasons {sorted(undeclared)}")
    written = result.select([name for name in result.column_names if name != DROP])
    check(written, stage.writes, stage.name)
    return written, drop


def judge_seeds(stage: Stage, seeds: pa.Table) -> pa.Table:
    """Apply the metadata stage to seed rows: the same rows with `verdict` and `stage`, null where they live on."""
    _, drop = checked(stage, seeds, stage(seeds.select(list(stage.reads))))
    names = pc.if_else(pc.is_valid(drop), stage.name, pa.scalar(None, pa.string()))
    return seeds.append_column("verdict", drop).append_column("stage", names)


def _witnesses(known: pa.Table, rows: pa.Table, drop: pa.Array) -> pa.Table:
    """Add the photo of the first dropped row of each new reason, where it was fetched at all."""
    if "image" not in rows.column_names:
        return known
    seen = known.column("verdict").to_pylist()
    chosen = []
    for index, reason in enumerate(drop.to_pylist()):
        if reason and reason not in seen and rows["image"][index].is_valid:
            seen.append(reason)
            chosen.append(index)
    if not chosen:
        return known
    picked = put(rows.select(["key", "image"]), "verdict", drop).select(known.column_names).take(chosen)
    return pa.concat_tables([known, picked])
