"""One consumer's endless stream of batches; one can go on at any of its batches.

A consumer is one loader process of one training process. Who reads what, and in which order, follows from seed, epoch
and the number of consumers: the shards are permuted anew for each epoch, and the sequence of all their samples is cut
into one contiguous range per consumer, so that one shard serves many consumers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

import numpy as np
from webdataset.filters import shuffle

from pipeline.shared.tars import Wish
from pipeline.train.loader.batches import Batch, Position, collate
from pipeline.train.loader.dataset import Dataset
from pipeline.train.loader.pairs import PAD, one_of, persons
from pipeline.train.loader.plan_sample import Planned, Planner
from pipeline.train.loader.reading import Reading
from pipeline.train.loader.shards import samples
from pipeline.train.settings import TrainConfig
from schemas.buckets import Size
from schemas.errors import SourceError

_SHARDS, _DRAWS = 0, 1
"""Beginnings of seeds: of the shards' permutation, and of the draws for samples' fates and shuffling."""
_EMPTY_EPOCHS = 3
"""A small share of a dataset may happen to have no crop in one epoch."""
SampleRange = tuple[int, int, int]
"""Index of a shard, start and stop: its samples [start, stop)."""


def sample_ranges(kept: Sequence[int], seed: int, epoch: int, consumer: int, consumers: int) -> list[SampleRange]:
    """The part of one of `consumers` of an epoch, in reading order; together theirs are all samples, once each."""
    total = sum(kept)
    first, last = consumer * total // consumers, (consumer + 1) * total // consumers
    ranges, position = [], 0
    for shard in np.random.default_rng([_SHARDS, seed, epoch]).permutation(len(kept)).tolist():
        start, stop = max(first - position, 0), min(last - position, kept[shard])
        if start < stop:
            ranges.append((shard, start, stop))
        position += kept[shard]
    return ranges


@dataclass
class Consumer:
    """Reads its share of every epoch, one epoch after the other."""

    dataset: Dataset
    reading: Reading
    config: TrainConfig
    worker: int
    """Its number in its own training process."""
    consumer: int
    """Its number among all `consumers`."""
    consumers: int
    _replays: bool = False

    def batches(self, epoch: int, index: int) -> Iterator[Batch]:
        """Batches from the `index`-th of an epoch on, without end.

        What comes before in that epoch is replayed: of each sample the json alone is read, nothing is decoded.

        Raises:
            CorruptShardError: names shard and key of what is damaged.
            SourceError: when no sample is one to train on.
        """
        empty = 0
        for number in count(epoch):
            before, empty = index if number == epoch else 0, empty + 1
            self._replays = before > 0
            for position, group in enumerate(grouped(self._planned(number), self.config.data.batch_size)):
                self._replays = position + 1 < before
                empty = 0
                if position >= before:
                    yield collate(group, self.reading, Position(self.worker, number, position))
            if empty == max(_EMPTY_EPOCHS, self.consumers):  # as much as the whole dataset
                folders = self.dataset.folders
                raise SourceError(
                    f"None of the samples that were read from {folders} has a crop of data.crops, and is of a kind in "
                    "data.kinds."
                )

    def _planned(self, epoch: int) -> Iterator[Planned]:
        config, shards, wanted = self.config, self.dataset.shards, self.reading.wanted
        draws = np.random.default_rng([_DRAWS, config.seed, epoch, self.consumer])
        shuffling = Random(int(draws.integers(2**63)))  # noqa: S311  # an order, not a secret
        plan = Planner(self.reading, config, draws)

        def wish(suffix: str) -> bool | None:
            if suffix not in wanted:
                return None
            return not self._replays or suffix == "json"

        kept = [shard.manifest.kept for shard in shards]
        ranges = sample_ranges(kept, config.seed, epoch, self.consumer, self.consumers)
        if config.data.pairs or config.data.balance == "person":
            planned = self._by_person(ranges, wish, plan, draws.spawn(1)[0])
        else:
            raws = (raw for shard, start, stop in ranges for raw in samples(shards[shard], start, stop, wish))
            planned = (one for raw in raws if (one := plan(raw)) is not None)
        shuffled: Iterator[Planned] = shuffle(config.data.shuffle, rng=shuffling)(planned)
        return shuffled

    def _by_person(
        self, ranges: Iterable[SampleRange], wish: Wish, plan: Planner, draws: np.random.Generator
    ) -> Iterator[Planned]:
        """All samples of the ranges, each planned with others of its person; or one of each person."""
        for index, start, stop in ranges:
            shard = self.dataset.shards[index]
            first = max(0, start - PAD)
            numbered = enumerate(samples(shard, first, stop + PAD, wish), first)
            raws = ((start <= number < stop, raw) for number, raw in numbered)
            for members in persons(raws, self.reading.condition):
                planned = (one for raw, others in members if (one := plan(raw, others)) is not None)
                yield from one_of(planned, draws) if self.config.data.balance == "person" else planned


def grouped(planned: Iterable[Planned], size: int) -> Iterator[Sequence[Planned]]:
    """Groups of `size` samples whose targets have one size, and whose conditions are of equally many photos.

    Smaller ones come at the end, so that none is lost.
    """
    waiting: dict[tuple[Size, int], list[Planned]] = {}
    for one in planned:
        key = one.fit.size, len(one.id_from)
        group = waiting.setdefault(key, [])
        group.append(one)
        if len(group) == size:
            yield waiting.pop(key)
    for key in sorted(waiting):
        yield waiting[key]
