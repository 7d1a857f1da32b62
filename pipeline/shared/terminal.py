"""How far a run is, for people: bars on a terminal, a plain line now and then elsewhere (a log, a pipe)."""

import time
from collections.abc import Iterator, Sequence
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

LINE_EVERY_S = 15.0
"""Without a terminal, a line at most this often; after minutes ever more seldom, until it is every ten minutes."""
_SELDOM, _MOST_SELDOM_S = 20, 600.0
"""A line each time that a run has become a twentieth longer: in three days there are 500."""
_NOTES_EVERY_S = 1.0


class _Bars(Progress):
    """Bars under some lines of text."""

    notes: Sequence[str] = ()

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from (Text(line) for line in self.notes)
        yield self.make_tasks_table(self.tasks)


class Screen:
    """One bar for the whole run; further ones may be added to `bars`. A context manager: bars are drawn inside."""

    def __init__(self, console: Console, label: str, line: str, total: int | None, start: int = 0) -> None:
        """A run that begins at `start` of `total`, where that is known.

        `label` stands before its bar; `line`, such as "{done:,} of {total} rows", begins the plain lines.
        """
        self._console, self._line = console, line
        self._total, self._start, self._done = total, start, start
        self._begun = self._last_line = self._last_notes = time.monotonic()
        self.bars = _Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._whole = self.bars.add_task(label, total=total, completed=start, words="")

    def __enter__(self) -> Self:
        self._begun = self._last_line = time.monotonic()
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def skip(self, count: int) -> None:
        """So much was done before this run, and says nothing of its pace."""
        self._start += count
        self.advance(count)

    def grow(self, count: int) -> None:
        """So much more is to be done than was known at first, where anything was."""
        if self._total is not None:
            self._total += count
            self.bars.update(self._whole, total=self._total)

    def advance(self, count: int, words: str | None = None) -> None:
        """So much more of the whole is done (or less, where it is done anew).

        `words` are the latest measurements; with them a line is due: now and then, and when all is done.
        """
        self._done += count
        if words is None:
            self.bars.update(self._whole, completed=self._done)
            return
        self.bars.update(self._whole, completed=self._done, words=words)
        now = time.monotonic()
        if self._console.is_terminal:
            if now > self._last_notes + _NOTES_EVERY_S:
                self.bars.notes, self._last_notes = self.notes(), now
            return
        seldom = min((now - self._begun) / _SELDOM, _MOST_SELDOM_S)
        is_over = bool(count) and self._done == self._total
        if now - self._last_line > max(LINE_EVERY_S, seldom) or is_over:
            total = "?" if self._total is None else f"{self._total:,}"
            left = ""
            if self._total is not None and self._start < self._done < self._total:
                # Going by what was done since the start.
                seconds = (time.monotonic() - self._begun) * (self._total - self._done) / (self._done - self._start)
                length, unit = (1, "s") if seconds < 90 else (60, "min") if seconds < 7200 else (3600, "h")
                left = f", about {seconds / length:,.0f} {unit} left"
            line = f"{self._line.format(done=self._done, total=total)}, {words}{left}"
            self.say("\n  ".join([line, *([] if is_over else self.notes())]))

    def notes(self) -> list[str]:
        """Further lines, for whoever has some to give."""
        return []

    def say(self, text: str) -> None:
        """One line, above the bars."""
        self._last_line = time.monotonic()
        self._console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)
