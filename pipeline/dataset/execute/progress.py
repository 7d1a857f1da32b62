"""The screen of a run: counts of its events, and a bar for each shard that is made."""

import time
from typing import Any

from rich.console import Console
from rich.progress import TaskID

from pipeline.dataset.execute.make_shard import METADATA, Event, Finished, Started
from pipeline.dataset.execute.tally import Tally, details
from pipeline.shared.terminal import Screen


class RunScreen(Screen):
    """Counts and shows the events of a run; a context manager. Shards get no line each: there are thousands."""

    def __init__(self, console: Console, total_rows: int | None) -> None:
        super().__init__(console, "all", "{done:,} of {total} rows", total_rows)
        self.tally = Tally(total_rows)
        self._bars: dict[str, TaskID] = {}

    def begin(self) -> None:
        """What was started until now is not this run's pace."""
        self._begun = self.tally.begun = time.monotonic()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.say("\n".join(self.notes()))

    def notes(self) -> list[str]:
        return details(self.tally.snapshot())

    def done_before(self, rows: int) -> None:
        """Count a shard that an earlier run made."""
        self.tally.shards["before"] += 1
        self.tally.rows_before += rows
        self.skip(rows)

    def expect(self, rows: int) -> None:
        """So many rows get a second chance, on top of the total."""
        if self.tally.total_rows is not None:
            self.tally.total_rows += rows
        self.grow(rows)

    def show(self, event: Event) -> dict[str, Any]:
        """Take an event; what the run has come to by now, as `Tally.counts` has it."""
        before = self.tally.rows
        self.tally.take(event)
        if event.shard in self._bars and event.shard in self.tally.making:
            self.bars.update(self._bars[event.shard], completed=self.tally.making[event.shard].total())
        elif isinstance(event, Started):
            self._bars[event.shard] = self.bars.add_task(event.shard, total=event.rows, words="")
        elif event.shard in self._bars:
            self.bars.remove_task(self._bars.pop(event.shard))
        if isinstance(event, Finished) and event.manifest is None:
            why = "" if event.lost else f": {event.error}"  # what the whole run lost stands at its end
            again = "" if event.shard == METADATA else ", a rerun tries it again"  # only who mends a part helps it
            self.say(f"{event.shard}: FAILED{again}{why}")
        now = self.tally.counts()
        kept = f"kept {now['kept']:,} ({100 * now['kept'] / max(1, now['rows']):.1f} %)"
        self.advance(now["rows"] - before, f"{now['rows_per_second']:,.1f} rows/s, {kept}")
        return now
