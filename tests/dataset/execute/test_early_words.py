"""Early words: said when something is wrong, and never of ordinary LAION."""

import random
from collections import Counter

import pytest

from pipeline.dataset.execute.early_words import EarlyWords
from pipeline.dataset.execute.make_shard import Advanced, Started
from pipeline.dataset.execute.tally import Tally
from schemas.columns import KEPT
from stages.fetch.engine import RESOLVER, FetchTimes

ORDINARY = {
    # of rows that their metadata lets live: a third of the links is dead, nine in ten are dropped in all
    ("download", "not_found"): 13,
    ("download", "dns_error"): 8,
    ("download", "connection_error"): 5,
    ("download", "timeout"): 4,
    ("download", "access_denied"): 3,
    ("size", "small_image"): 17,
    ("filter", "no_face"): 35,
    ("filter", "small_face"): 5,
    ("pack", KEPT): 10,
}


def said(batches, *, rows=3000, captions=2999, shards=1):
    """The kinds of words about a run of such batches: (outcomes, seconds per name that was looked up)."""
    tally, words, kinds = Tally(None), EarlyWords(), {}
    for shard in range(shards):
        tally.take(Started(str(shard), rows, captions))
    for outcomes, name_s in batches:
        names = outcomes.total() // 2
        times = FetchTimes(Counter({RESOLVER: names}), Counter({RESOLVER: round(1e6 * names * name_s)}))
        tally.take(Advanced("0", outcomes, fetches=times))
        kinds = {**dict(words.of(tally.snapshot())), **kinds}
    return kinds


def drawn(weights, seed, *, batches=50, size=100, name_s=0.2):
    rng = random.Random(seed)
    fates, shares = list(weights), list(weights.values())
    return [(Counter(rng.choices(fates, shares, k=size)), name_s) for _ in range(batches)]


@pytest.mark.parametrize("seed", range(20))
def test_ordinary_laion_raises_no_alarm(seed):
    """Many shards begin at once, whose metadata drops 97 %, before the first of their rows is fetched."""
    unfit = (Counter({("metadata", "small_image"): 97_000}), 0)
    assert said([unfit, *drawn(ORDINARY, seed)], rows=100_000, captions=99_000) == {}
    meagre = {**ORDINARY, ("pack", KEPT): 1, ("filter", "no_face"): 44}  # 1 % kept
    assert said(drawn(meagre, seed)) == {}


@pytest.mark.parametrize("fine", [0, 20])
def test_a_network_that_is_gone_is_said_also_after_days(fine):
    broken = {("download", "connection_error"): 70, ("download", "dns_error"): 20, ("download", "not_found"): 10}
    words = said([*drawn(ORDINARY, 0, batches=fine), *drawn(broken, 1, batches=20)])
    assert "most as connection_error" in words.pop("network")
    assert set(words) == (set() if fine else {"nothing_kept"})


def test_a_resolver_that_answers_slowly():
    assert "takes 1.5 s per name" in said(drawn(ORDINARY, 0, name_s=1.5))["resolver"]
    assert said(drawn(ORDINARY, 0, name_s=0.4)) == {}


def test_nothing_kept_of_the_first_thousand_names_reason_and_threshold():
    fate = {("download", "not_found"): 30, ("filter", "small_face"): 70}
    unfit = (Counter({("metadata", "small_image"): 2_000}), 0)  # most frequent, and not why
    (words,) = said([unfit, *drawn(fate, 0)]).values()
    assert words.startswith("NOTHING IS KEPT of the first 1,000 rows that were fetched: ")
    assert words.index("small_face") < words.index("filter.min_face_px") < words.index("not_found")
    assert "small_image" not in words
    assert said(drawn(fate, 0, batches=9)) == {}


def test_metadata_that_lets_nothing_live():
    words = said([(Counter({("metadata", "small_image"): 99_950}), 0)], rows=100_000)
    assert "filter.min_image_px" in words["nothing_kept"]


def test_a_caption_column_that_is_always_empty():
    assert "source.columns.text=" in said(drawn(ORDINARY, 0), captions=0)["captions"]
    assert said(drawn(ORDINARY, 0), rows=900, captions=0) == {}
