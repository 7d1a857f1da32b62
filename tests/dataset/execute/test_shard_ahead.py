import threading
import time

import pytest

from pipeline.dataset.execute import make_shard as shard
from pipeline.dataset.execute.make_shard import ordered_ahead


def test_results_come_in_order_and_those_behind_a_slow_one_are_begun():
    begun = []
    release = threading.Event()

    def work(n):
        begun.append(n)
        if n == 0:
            release.wait(5)
        if n == 19:
            release.set()
        return n

    assert list(ordered_ahead(work, iter(range(40)), 20)) == list(range(40))
    assert begun.index(19) < 20


def test_no_more_are_begun_before_their_turn_than_asked_for():
    running, peak = set(), []

    def work(n):
        running.add(n)
        peak.append(len(running))
        time.sleep(0.001)
        return n

    for n in ordered_ahead(work, iter(range(60)), 5):
        running.discard(n)
    assert max(peak) <= 7


def test_heavy_results_that_wait_hold_back_the_next(monkeypatch):
    monkeypatch.setattr(shard, "_MOST_AHEAD", 10)
    begun, release = [], threading.Event()

    def items():
        for n in range(50):
            time.sleep(0.005)
            yield n

    def work(n):
        begun.append(n)
        if n == 0:
            release.wait(5)
        return n

    threading.Timer(0.5, lambda: begun.append("waited") or release.set()).start()
    assert list(ordered_ahead(work, items(), 30, weight=lambda n: 4)) == list(range(50))
    assert begun.index("waited") < 10


def test_what_those_under_way_will_weigh_is_foreseen(monkeypatch):
    """Hundreds of batches of which each waits for one slow row would hold all their other images."""
    monkeypatch.setattr(shard, "_MOST_AHEAD", 40)
    monkeypatch.setattr(shard, "_FIRST_WEIGHT", 4)
    release, begun = threading.Event(), []

    def work(n):
        begun.append(n)
        if n >= 20:
            release.wait(5)
        return n

    threading.Timer(0.5, lambda: begun.append("waited") or release.set()).start()
    assert list(ordered_ahead(work, iter(range(80)), 60, weight=lambda n: 4)) == list(range(80))
    assert begun.index("waited") <= 31


def test_an_error_comes_at_its_turn_and_ends_the_rest():
    def work(n):
        if n == 3:
            raise ValueError(n)
        return n

    results = ordered_ahead(work, iter(range(100)), 4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="3"):
        next(results)
