import io
from types import SimpleNamespace

from rich.console import Console

from pipeline import options
from pipeline.shared import terminal
from pipeline.shared.terminal import Screen


def lines(monkeypatch, *, total, start=0):
    """A screen without a terminal, three minutes after it began, and what it writes."""
    now = [0.0]
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: now[0]))
    text = io.StringIO()
    screen = Screen(Console(file=text, width=160), "train", "step {done:,} of {total}", total, start)
    now[0] = 180.0
    return screen, text


def test_a_line_says_how_far_it_is_what_was_measured_and_how_long_the_rest_takes(monkeypatch):
    screen, text = lines(monkeypatch, total=4000)
    screen.advance(1000, "loss 0.5")
    assert text.getvalue() == "step 1,000 of 4,000, loss 0.5, about 9 min left\n"


def test_the_last_minute_is_told_in_seconds(monkeypatch):
    screen, text = lines(monkeypatch, total=4000)
    screen.advance(3000, "loss 0.5")
    assert text.getvalue() == "step 3,000 of 4,000, loss 0.5, about 60 s left\n"


def test_what_was_done_before_says_nothing_of_the_pace(monkeypatch):
    screen, text = lines(monkeypatch, total=4000, start=1000)
    screen.skip(1000)
    screen.advance(1000, "loss 0.5")
    assert text.getvalue() == "step 3,000 of 4,000, loss 0.5, about 3 min left\n"


def test_without_a_total_there_is_no_guess(monkeypatch):
    screen, text = lines(monkeypatch, total=None)
    screen.advance(5, "loss 0.5")
    assert text.getvalue() == "step 5 of ?, loss 0.5\n"


def test_lines_are_rare_but_for_the_last(monkeypatch):
    screen, text = lines(monkeypatch, total=3)
    for _ in range(3):
        screen.advance(1, "loss 0.5")
    assert [line[:6] for line in text.getvalue().splitlines()] == ["step 1", "step 3"]


def test_a_line_with_names_that_look_like_markup_stays_as_it_is(monkeypatch, capsys):
    screen, text = lines(monkeypatch, total=None)
    for out in (screen.say, options.say):
        out("runs/[v2]/:cat: is written")
    assert text.getvalue() == capsys.readouterr().out == "runs/[v2]/:cat: is written\n"
