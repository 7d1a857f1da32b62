"""Parts to seed tables: the rows of a part, judged by their metadata and cut into shards, as a stream."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.source.parts import Part, SourceSettings
from pipeline.dataset.source.values import to_seeds
from schemas.arrays import Doubles, Integers
from schemas.columns import SEED, schema
from schemas.names import shard_name

_COLUMNS = (*SEED, "verdict", "stage")
_ROWS_PER_CANDIDATE = 100
"""A shard holds at most this many input rows per candidate row, so that a part of small images is cut as well."""

JudgeSeeds = Callable[[pa.Table], pa.Table]
"""Seed columns -> the same rows with `verdict` and `stage`, null for candidates; called on a part's rows in order."""


@dataclass(frozen=True)
class Seeds:
    name: str
    part: str
    table: pa.Table
    """Seed columns, and `verdict` and `stage` where the metadata drops a row."""

    @property
    def candidates(self) -> int:
        """Rows that their metadata lets live on."""
        return int(self.table.column("verdict").null_count)


@dataclass
class Captions:
    """How many candidates have a caption, how many have several, and how many a damaged one."""

    rows: int = 0
    captions: int = 0
    several: int = 0
    damaged: int = 0

    def add(self, seeds: Seeds) -> None:
        table = seeds.table.filter(seeds.table.column("verdict").is_null())
        self.rows += table.num_rows
        self.captions += pc.sum(pc.greater(table["caption_chars"], 0)).as_py() or 0
        self.several += table.num_rows - table["text_alternatives"].null_count
        self.damaged += pc.sum(pc.match_substring(table["text"], "\ufffd")).as_py() or 0

    def __str__(self) -> str:
        several = f"; {self.several:,} have several, of which the first counts" if self.several else ""
        damaged = f"; {self.damaged:,} hold \ufffd, which stands for bytes that are no UTF-8" if self.damaged else ""
        nowhere = "; they are read from .txt files beside images, or from a column, which source.columns.text may name"
        none = nowhere if self.rows and not self.captions else ""
        return (
            f"Captions: {self.captions:,} of {self.rows:,} rows that pass the metadata filter{several}{damaged}{none}"
        )


def iter_shards(part: Part, settings: SourceSettings, metadata: JudgeSeeds) -> Iterator[Seeds]:
    """The shards of a part, in row order, in memory that its length does not change.

    Which rows a shard gets depends on the rows, `rows_per_shard` and `metadata` alone: it ends with the row that makes
    its candidates `rows_per_shard`, or at 100 times as many input rows. A part without rows gives one empty shard.
    """
    number = 0
    for number, table in enumerate(_cut(map(metadata, seed_tables(part)), settings.rows_per_shard), 1):
        yield Seeds(shard_name(part.name, number - 1), part.name, table)
    if number == 0:
        yield Seeds(shard_name(part.name, 0), part.name, schema(_COLUMNS).empty_table())


def iter_again(part: Part, settings: SourceSettings, rows: Integers, round: int) -> Iterator[Seeds]:
    """Some rows of a part in the shards of a further round, all of them candidates."""

    def candidates() -> Iterator[pa.Table]:
        for table in seed_tables(part):
            chosen = table.filter(pa.array(np.isin(table.column("row").to_numpy(), rows)))
            nulls = pa.nulls(chosen.num_rows, pa.string())
            yield chosen.append_column("verdict", nulls).append_column("stage", nulls)

    for number, table in enumerate(_cut(candidates(), settings.rows_per_shard)):
        yield Seeds(shard_name(part.name, number, round), part.name, table)


def seed_tables(part: Part) -> Iterator[pa.Table]:
    """The rows of a part in order, as tables of seed columns of bounded size."""
    row = 0
    for raw in part.tables():
        kind = pa.repeat(pa.scalar(part.source_kind), raw.num_rows)
        yield to_seeds(raw.append_column("source_kind", kind), part.name, row, part.path)
        row += raw.num_rows


def _cut(judged: Iterator[pa.Table], rows_per_shard: int) -> Iterator[pa.Table]:
    held: list[pa.Table] = []
    candidates, rows = rows_per_shard, rows_per_shard * _ROWS_PER_CANDIDATE
    for table in judged:
        alive = table.column("verdict").is_null().to_numpy()
        start = 0
        while start < len(alive):
            hits = np.flatnonzero(alive[start : start + rows])
            full = len(hits) >= candidates
            end = start + int(hits[candidates - 1]) + 1 if full else min(start + rows, len(alive))
            held.append(table.slice(start, end - start))
            candidates -= candidates if full else len(hits)
            rows -= end - start
            start = end
            if candidates == 0 or rows == 0:
                yield _joined(held)
                held, candidates, rows = [], rows_per_shard, rows_per_shard * _ROWS_PER_CANDIDATE
    if held:
        yield _joined(held)


def _joined(tables: list[pa.Table]) -> pa.Table:
    # Slices would carry the whole of their batches along when they are sent to another process. Chunks are copied into
    # one, so that there have to be two.
    return pa.concat_tables([*tables, tables[0].slice(0, 0)]).select(_COLUMNS).combine_chunks()


class Draw:
    """`size` of the candidates, each with the same chance; same parts and seed, same rows.

    Stratified: a part gives its share of `size`, rounded up or down, and those of its rows whose random keys are the
    least. Which parts are rounded up is by lot too (points at equal distances over the parts in random order): so all
    rows weigh the same also where there are more parts than rows to draw, and sums over the sample, times population /
    size, are unbiased estimates. How many rows there are need not be known before: no more are held than `size` and a
    few for each part.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._strata: dict[str, tuple[int, Doubles, pa.Table]] = {}
        """Part -> how many candidates it has, and those of the least keys, by which they are sorted."""

    @property
    def population(self) -> int:
        """Candidates so far."""
        return sum(size for size, _, _ in self._strata.values())

    def add(self, seeds: Seeds) -> None:
        """The candidates of a part's next shard."""
        rows = seeds.table.filter(pc.is_null(seeds.table["verdict"]))
        if seeds.part not in self._strata:
            population = max(1, self.population)
            for part, (size, keys, held) in self._strata.items():
                most = self.size * size // population + 1  # no more than its share, which only shrinks as others come
                self._strata[part] = size, keys[:most], held.slice(0, most)
        size, keys, held = self._strata.setdefault(seeds.part, (0, np.empty(0), rows.slice(0, 0)))
        dice = np.random.default_rng([self.seed, len(self._strata), size])
        keys = np.concatenate([keys, dice.random(rows.num_rows)])
        order = np.argsort(keys)[: self.size]
        # take() copies: slices would carry the whole of their shards along.
        table = pa.concat_tables([held, rows]).take(pa.array(order)).combine_chunks()
        self._strata[seeds.part] = size + rows.num_rows, keys[order], table

    def rows(self) -> pa.Table:
        """The sample in random order, columns as in `Seeds`; all candidates where there are fewer."""
        dice = np.random.default_rng([self.seed])
        strata = list(self._strata.values())
        strata = [strata[number] for number in dice.permutation(len(strata))]
        size = min(self.size, self.population)
        points = (dice.random() + np.arange(size)) * self.population / max(1, size)
        ends = np.cumsum([part_size for part_size, _, _ in strata])
        shares = np.bincount(np.searchsorted(ends, points, side="right"), minlength=len(strata))
        table = pa.concat_tables([rows.slice(0, int(n)) for (_, _, rows), n in zip(strata, shares, strict=True)])
        return table.take(pa.array(dice.permutation(table.num_rows))).combine_chunks()
