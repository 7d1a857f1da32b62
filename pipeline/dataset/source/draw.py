"""A random sample of the candidates of all parts, drawn while they stream by."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.source.seeds import Seeds


@dataclass
class _Stratum:
    """The candidates of a part: how many there are, and those of the least keys, by which they are sorted."""

    size: int
    keys: npt.NDArray[np.float64]
    rows: pa.Table

    def cut(self, most: int) -> None:
        self.keys, self.rows = self.keys[:most], self.rows.slice(0, most)


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
        self._strata: dict[str, _Stratum] = {}

    @property
    def population(self) -> int:
        """Candidates so far."""
        return sum(stratum.size for stratum in self._strata.values())

    def add(self, seeds: Seeds) -> None:
        """The candidates of a part's next shard."""
        rows = seeds.table.filter(pc.is_null(seeds.table["verdict"]))
        if seeds.part not in self._strata:
            population = max(1, self.population)
            for part in self._strata.values():  # none gives more than its share, which only shrinks as others come
                part.cut(self.size * part.size // population + 1)
            self._strata[seeds.part] = _Stratum(0, np.empty(0), rows.slice(0, 0))
        part = self._strata[seeds.part]
        number = len(self._strata)
        keys = np.concatenate([part.keys, np.random.default_rng([self.seed, number, part.size]).random(rows.num_rows)])
        order = np.argsort(keys)[: self.size]
        # take() copies: slices would carry the whole of their shards along.
        table = pa.concat_tables([part.rows, rows]).take(pa.array(order)).combine_chunks()
        self._strata[seeds.part] = _Stratum(part.size + rows.num_rows, keys[order], table)

    def rows(self) -> pa.Table:
        """The sample in random order, columns as in `Seeds`; all candidates where there are fewer."""
        dice = np.random.default_rng([self.seed])
        strata = list(self._strata.values())
        strata = [strata[number] for number in dice.permutation(len(strata))]
        size = min(self.size, self.population)
        points = (dice.random() + np.arange(size)) * self.population / max(1, size)
        ends = np.cumsum([part.size for part in strata])
        shares = np.bincount(np.searchsorted(ends, points, side="right"), minlength=len(strata))
        table = pa.concat_tables([part.rows.slice(0, int(share)) for part, share in zip(strata, shares, strict=True)])
        return table.take(pa.array(dice.permutation(table.num_rows))).combine_chunks()
