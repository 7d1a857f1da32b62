import io
from collections import Counter

import pytest
from rich.console import Console

from pipeline.dataset.execute.make_shard import Advanced, Finished, Started
from pipeline.dataset.execute.progress import RunScreen
from pipeline.dataset.execute.tally import Tally, details
from pipeline.shared import terminal
from schemas.columns import KEPT
from schemas.shard import Manifest
from stages.fetch.engine import RESOLVER, FetchTimes

MANIFEST = Manifest("p-00000", "embedded", "ab", 10, 4, {"no_face": 6}, [], {})


def advanced(shard="p-00000", kept=0, took=None, fetches=None, **dropped):
    """News of rows that were dropped by `stage__reason`, and some that were kept."""
    outcomes = Counter({tuple(name.split("__")): rows for name, rows in dropped.items()})
    outcomes["pack", KEPT] += kept
    return Advanced(shard, outcomes, Counter(took or {}), fetches or FetchTimes())


TEN = advanced(kept=4, filter__no_face=6)


def screen(*, terminal: bool, width: int = 160) -> tuple[RunScreen, io.StringIO]:
    text = io.StringIO()
    return RunScreen(Console(file=text, force_terminal=terminal, width=width), total_rows=20), text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_ends_with_its_shards_its_rate_and_its_kept_share(terminal):
    shown, text = screen(terminal=terminal)
    with shown:
        for event in (Started("p-00000", 10), TEN, Finished("p-00000", MANIFEST)):
            shown.show(event)
    assert "shards: 1 made, 0 done before, 0 failed" in text.getvalue()
    assert ("kept 4 (40.0 %)" in text.getvalue()) == terminal  # half of the rows are done: no line is due elsewhere
    assert ("━" in text.getvalue()) == terminal


def test_on_a_terminal_the_notes_stand_above_the_bars(monkeypatch):
    monkeypatch.setattr(terminal, "_NOTES_EVERY_S", -1.0)
    shown, text = screen(terminal=True)
    with shown:
        shown.show(Started("p-00000", 10))
        shown.show(TEN)
    drawn = text.getvalue()
    assert drawn.index("rows left after filter 4") < drawn.rindex("━")


def test_without_a_terminal_a_line_tells_how_far_it_is_and_how_long_it_will_take(monkeypatch):
    monkeypatch.setattr(terminal, "LINE_EVERY_S", 0.0)
    shown, text = screen(terminal=False)
    with shown:
        shown.show(Started("p-00000", 10))
        shown.show(advanced(kept=1, filter__no_face=4))
    assert "5 of 20 rows" in text.getvalue()
    assert ", about 0 s left" in text.getvalue()
    assert "\n  rows left after filter 1" in text.getvalue()


def test_a_failed_shard_is_told_with_its_error_and_its_rows_count_no_more():
    shown, text = screen(terminal=False)
    with shown:
        shown.done_before(10)
        shown.show(Started("p-00001", 10))
        shown.show(advanced("p-00001", kept=1))
        shown.show(Finished.failed("p-00001", OSError("No space left on device [x]")))
        now = shown.show(Finished.failed("metadata", ZeroDivisionError("bug")))
    assert (now["rows"], now["kept"], now["rows_before"]) == (0, 0, 10)
    assert now["shards"] == {"made": 0, "failed": 2, "before": 1, "making": 0}
    assert "p-00001: FAILED, a rerun tries it again: OSError: No space left on device [x]" in text.getvalue()
    assert "ZeroDivisionError: bug" in text.getvalue()


def test_a_shard_that_ray_starts_again_is_one_shard():
    shown, _ = screen(terminal=True)
    with shown:
        for event in (Started("p-00000", 10), TEN, Started("p-00000", 10), TEN):
            now = shown.show(event)
        assert [task.completed for task in shown.bars.tasks] == [10, 10]
        now = shown.show(Finished("p-00000", MANIFEST))
    assert (now["rows"], now["kept"], now["shards"]["made"]) == (10, 4, 1)
    assert len(shown.bars.tasks) == 1


def test_stages_hosts_and_failures_of_a_snapshot():
    slow = FetchTimes(Counter(slow=10, fast=30, once=1), Counter(slow=50_000_000, fast=3_000_000, once=9_000_000))
    slow.fetches[RESOLVER], slow.microseconds[RESOLVER] = 4, 2_000_000
    tally = Tally(30)
    tally.take(Started("p-00000", 20, captions=7))
    tally.take(advanced(metadata__unsafe=5))
    tally.take(advanced(took={"download": 9_000_000}, fetches=slow, kept=2, download__timeout=3, size__small_image=5))
    now = tally.snapshot()
    stages = {name: (one["rows_in"], one["rows_out"]) for name, one in now["stages"].items()}
    assert [stages[name] for name in ("metadata", "download", "size", "pack")] == [(15, 10), (10, 7), (7, 2), (2, 2)]
    assert now["stages"]["download"]["dropped"] == {"timeout": 3}
    assert (now["rows"], now["kept"], now["network_failures"], now["captions"]) == (15, 2, 3, 7)
    assert now["slowest_hosts"] == {"slow": 5.0, "fast": 0.1}  # of a single fetch nothing is concluded
    assert (now["names"], now["name_seconds"]) == (4, 2.0)
    assert details(now) == [
        "shards: 0 made, 0 done before, 0 failed; rows that the network failed: 3 (20.0 %)",
        "rows left after metadata 10, download 7 (9 s), size 2",
        "slow hosts: slow 5.0 s per fetch",
    ]
    assert details(Tally(30).snapshot()) == ["shards: 0 made, 0 done before, 0 failed"], "no network, no word of it"


def test_the_table_of_hosts_is_bounded_and_keeps_those_that_take_time():
    tally = Tally(None)
    tally.take(Started("p-00000", 1))
    for n in range(1000):
        hosts = Counter({f"h{n}-{i}": 10 for i in range(10)})
        times = Counter(dict.fromkeys(hosts, 1000000 + n))
        tally.take(advanced(fetches=FetchTimes(hosts + Counter(slow=1), times + Counter(slow=60_000_000))))
    assert len(tally._fetches.fetches) <= 4_010
    assert tally.snapshot()["slowest_hosts"]["slow"] == 60.0
