"""Who reads what, and in which order: all of it follows from seed, epoch and the number of consumers.

A consumer is one loader process of one training process. The shards are permuted anew for each epoch, and the
sequence of all their samples is cut into one contiguous range per consumer, so that one shard serves many consumers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_SHARDS, _DRAWS = 0, 1


class SampleRange(NamedTuple):
    """Consecutive samples of one shard."""

    shard: int
    """Index in the dataset."""
    start: int
    stop: int
    """Samples [start, stop) of the shard."""


def shard_order(seed: int, epoch: int, shards: int) -> list[int]:
    """A permutation of the shards' indices."""
    return [int(index) for index in np.random.default_rng([_SHARDS, seed, epoch]).permutation(shards)]


def draws_generator(seed: int, epoch: int, consumer: int) -> np.random.Generator:
    """What a consumer draws its samples' fates and its shuffling from."""
    return np.random.default_rng([_DRAWS, seed, epoch, consumer])


def sample_ranges(kept: Sequence[int], seed: int, epoch: int, consumer: int, consumers: int) -> list[SampleRange]:
    """The consumer's part of an epoch, in reading order; together the consumers' parts are all samples, once each.

    Args:
        kept: samples of each shard.
        seed: of the run.
        epoch: from 0.
        consumer: from 0.
        consumers: how many there are.
    """
    total = sum(kept)
    first, last = consumer * total // consumers, (consumer + 1) * total // consumers
    ranges, position = [], 0
    for shard in shard_order(seed, epoch, len(kept)):
        start, stop = max(first - position, 0), min(last - position, kept[shard])
        if start < stop:
            ranges.append(SampleRange(shard, start, stop))
        position += kept[shard]
    return ranges
