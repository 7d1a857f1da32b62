"""Who reads what: every sample once per epoch, whatever the number of consumers."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipeline.train.loader.stream import sample_ranges

KEPT = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(KEPT, st.integers(0, 99), st.integers(0, 3), st.integers(1, 8))
def test_consumers_share_an_epoch_without_gap_or_overlap(
    kept: list[int], seed: int, epoch: int, consumers: int
) -> None:
    parts = [sample_ranges(kept, seed, epoch, consumer, consumers) for consumer in range(consumers)]
    seen = Counter((shard, number) for part in parts for shard, *ends in part for number in range(*ends))
    assert seen == Counter((shard, number) for shard, count in enumerate(kept) for number in range(count))
    sizes = [sum(stop - start for _, start, stop in part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(size >= 1 for size in sizes) == (sum(kept) >= consumers)


@given(KEPT, st.integers(0, 99))
def test_a_consumer_opens_only_the_shards_of_its_range_and_each_once(kept: list[int], seed: int) -> None:
    for consumer in range(3):
        opened = [shard for shard, *_ in sample_ranges(kept, seed, 0, consumer, 3)]
        assert len(set(opened)) == len(opened)
