"""From a sample to the whole: totals with ranges that hold for few, for skewed, and for unequal parts.

The sample is one of equal weights, stratified over the parts (`seeds.Draw`). Its sums have no more variance than those
of a simple random sample of the same size: what a part gives cannot vary between draws (Hoeffding 1956 for counts). So
ranges for simple random samples are on the safe side, whatever the parts hold. A variance within parts would be the
sharper tool where each part gives many rows; of a hundred parts that give five each, most show no variance at all.

Each range is one of 96.7 %, so that three of them (images, bytes, time) hold together in 9 of 10 forecasts.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # imports its parts when they are used: a plan without a forecast is spared a second

from schemas.arrays import Doubles

TAIL = 0.1 / 3 / 2
"""Chance to lie beyond either end of a range."""


@dataclass(frozen=True)
class Range:
    """JSON-able as a dict."""

    estimate: float
    low: float
    high: float

    def __add__(self, other: "Range") -> "Range":
        """Both together: ends are added, which is right for what may go together, and wide for what does not."""
        return Range(self.estimate + other.estimate, self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> "Range":
        return Range(self.estimate * factor, self.low * factor, self.high * factor)

    @staticmethod
    def within(estimate: float, factor: float = 1.0) -> "Range":
        """Up to `factor` times more or less."""
        return Range(estimate, estimate / factor, estimate * factor)


def count(hits: int, size: int, population: int) -> Range:
    """How many of a population are such as `hits` of a sample of `size` are: Clopper and Pearson's exact range.

    The hypergeometric one: it ends at what is known, and is no range at all where the sample is the population.
    """
    if not size:
        return Range(0, 0, population)
    possible = range(hits, population - (size - hits) + 1)
    low = bisect_left(possible, TAIL, key=lambda total: scipy.stats.hypergeom.sf(hits - 1, population, total, size))
    above = bisect_left(possible, -TAIL, key=lambda total: -scipy.stats.hypergeom.cdf(hits, population, total, size))
    return Range(population * hits / size, possible[min(low, len(possible) - 1)], possible[max(0, above - 1)])


def total(values: Doubles, population: int, typical: float) -> Range:
    """The sum of amounts, many of which are 0, over a population, by those of a sample.

    How many are not 0, and the mean of those, are independent: their relative errors add as squares, on a log scale
    (MOVER, Zou and Donner 2008). A mean of few skewed amounts (files) looks too small too often: its error is Student's
    or that of a log-normal's mean (Cox), whichever is larger. `typical` stands in for the mean where all are 0.
    """
    amounts = values[values > 0]
    hits = count(len(amounts), len(values), population)
    if not len(amounts):
        return hits * typical
    mean = float(amounts.mean())
    logs = np.log(amounts)
    spread = float(np.sum((logs - logs.mean()) ** 2) + 2) / (len(amounts) + 1)
    error = max(_error(amounts / mean - 1), math.sqrt(spread + spread**2 / 2) / math.sqrt(len(amounts)))
    error *= _quantile(len(amounts)) * math.sqrt(1 - len(amounts) / max(hits.estimate, len(amounts)))
    estimate = hits.estimate * mean
    low = math.hypot(math.log(hits.estimate / hits.low), error)
    high = math.hypot(math.log(hits.high / hits.estimate), error)
    return Range(estimate, max(estimate * math.exp(-low), float(amounts.sum())), estimate * math.exp(high))


def rate(amounts: Doubles, sizes: Doubles) -> Range:
    """Amount per unit of size, by batches that have some of both: the ratio of their sums."""
    ratio = float(amounts.sum() / sizes.sum())
    deviations = (amounts - ratio * sizes) / max(float(amounts.mean()), 1e-12)
    return Range.within(ratio, math.exp(_error(deviations) * _quantile(len(amounts))))


def _error(deviations: Sequence[float] | Doubles) -> float:
    """Relative standard error of a mean of relative deviations; two more, of 100 %, are added: few show too little."""
    return math.sqrt((float(np.sum(np.square(deviations))) + 2) / (len(deviations) + 1) / len(deviations))


def _quantile(number: int) -> float:
    return float(scipy.stats.t.ppf(1 - TAIL, number + 1))
