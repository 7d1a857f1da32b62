import io

import pytest
from rich.console import Console

from pipeline.dataset.execute.make_shard import Advanced, Finished, Started
from pipeline.dataset.execute.progress import RunScreen
from pipeline.shared import terminal
from schemas.shard import Manifest

MANIFEST = Manifest("p-00000", "embedded", "ab", 10, 4, {"no_face": 6}, [], {})


def screen(*, terminal: bool) -> tuple[RunScreen, io.StringIO]:
    text = io.StringIO()
    return RunScreen(Console(file=text, force_terminal=terminal, width=160), total_rows=20), text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_finished_shard_is_told_with_its_rate_and_kept_share(terminal):
    shown, text = screen(terminal=terminal)
    with shown:
        for event in (Started("p-00000", 10), Advanced("p-00000", 10, 4), Finished("p-00000", MANIFEST)):
            shown.show(event)
    assert "p-00000: 10 rows, " in text.getvalue()
    assert "kept 4 (40.0 %)" in text.getvalue()
    assert ("━" in text.getvalue()) == terminal


def test_without_a_terminal_a_line_tells_how_far_it_is_and_how_long_it_will_take(monkeypatch):
    monkeypatch.setattr(terminal, "LINE_EVERY_S", 0.0)
    shown, text = screen(terminal=False)
    with shown:
        shown.show(Started("p-00000", 10))
        shown.show(Advanced("p-00000", 5, 1))
    assert "5 of 20 rows" in text.getvalue()
    assert "min left" in text.getvalue()


def test_a_failed_shard_is_told_with_its_error_and_a_done_one_as_done():
    shown, text = screen(terminal=False)
    with shown:
        shown.done_before("p-00000", 10)
        shown.show(Started("p-00001", 10))
        shown.show(Finished.failed("p-00001", OSError("No space left on device [x]")))
        shown.show(Finished.failed("metadata", ZeroDivisionError("bug")))
    assert "p-00000: done before" in text.getvalue()
    assert "p-00001: FAILED, a rerun tries it again: OSError: No space left on device [x]" in text.getvalue()
    assert "ZeroDivisionError: bug" in text.getvalue()


def test_a_shard_that_ray_starts_again_is_one_shard():
    shown, text = screen(terminal=False)
    with shown:
        shown.show(Started("p-00000", 10))
        shown.show(Started("p-00000", 10))
        shown.show(Advanced("p-00000", 10, 4))
        shown.show(Finished("p-00000", MANIFEST))
    assert text.getvalue().count("p-00000") == 1
