"""Photos of one person, which lie side by side in a shard: whose features may stand for whose target."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import TypeVar

import numpy as np

from pipeline.train.loader.dataset import Dataset
from pipeline.train.loader.shards import Raw, meta, samples
from schemas.errors import SourceError

T = TypeVar("T")

WINDOW = 16
"""Photos of a person that are held whole at once, beside the condition files of as many before them."""
PAD = 8
"""Samples that are read beyond both ends of a consumer's range, so that a person who is cut there has others."""
_SHARDS, _SAMPLES = 8, 250
"""Shards, and samples at the beginning of each, in which persons are counted before step 0."""


def person(raw: Raw) -> object:
    """Equal for neighbours that show one person; a photo of which the json does not say it is its own."""
    number = meta(raw).get("person")
    return raw.key if number is None else (number,)


def persons(
    raws: Iterable[tuple[bool, Raw]], suffixes: Collection[str]
) -> Iterator[Iterator[tuple[Raw, Sequence[Raw]]]]:
    """For each person in a stretch of one shard: the photos, each with up to 2 * WINDOW - 1 others of the person.

    Of `raws` some are not to come out, but others' others alone. Of others the files of `suffixes` alone are held.
    """
    for _, members in groupby(raws, key=lambda one: person(one[1])):
        yield _with_others(members, suffixes)


def _with_others(members: Iterator[tuple[bool, Raw]], suffixes: Collection[str]) -> Iterator[tuple[Raw, list[Raw]]]:
    before: list[Raw] = []
    while window := list(islice(members, WINDOW)):
        own = [
            raw._replace(files={suffix: data for suffix, data in raw.files.items() if suffix in suffixes})
            for _, raw in window
        ]
        for number, (comes_out, raw) in enumerate(window):
            if comes_out:
                yield raw, [*before, *own[:number], *own[number + 1 :]]
        before = own


def one_of(values: Iterable[T], draws: np.random.Generator) -> Iterator[T]:
    """One of the values, each as likely, of which two are held at a time; nothing of none."""
    chosen: list[T] = []
    for count, value in enumerate(values, 1):
        if draws.random() * count < 1:
            chosen = [value]
    yield from chosen


def lonely(dataset: Dataset) -> tuple[int, int]:
    """How many photos at the beginnings of some shards were counted, and how many of them have no other of the person.

    Raises:
        SourceError: when none of them has any.
        CorruptShardError: for a damaged sample.
    """
    photos = alone = 0
    for shard in dataset.shards[:: max(1, len(dataset.shards) // _SHARDS)][:_SHARDS]:
        raws = samples(shard, 0, _SAMPLES, lambda suffix: True if suffix == "json" else None)
        sizes = [sum(1 for _ in members) for _, members in groupby(raws, key=person)]
        if shard.manifest.kept > _SAMPLES and len(sizes) > 1:
            sizes.pop()  # of the last one there may be more
        photos, alone = photos + sum(sizes), alone + sizes.count(1)
    if photos == alone:
        raise SourceError(
            f"No two photos side by side in {dataset.folders} are known to show one person, which data.pairs and "
            "data.balance = person need: train on a dataset that `python -m pipeline group` made."
        )
    return photos, alone
