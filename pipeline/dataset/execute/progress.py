"""Words on the screen while a run goes: bars on a terminal, plain lines elsewhere."""

import time
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipeline.dataset.execute.make_shard import Event, Finished, Started
from pipeline.dataset.execute.make_shard import Progress as Batch

_LINE_EVERY_S = 15.0
"""Without a terminal, a line at least this often."""


@dataclass
class Tally:
    """What was done so far, of a shard or of all."""

    rows: int = 0
    kept: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, rows: int, kept: int) -> None:
        """Count finished rows."""
        self.rows += rows
        self.kept += kept

    def pace(self) -> str:
        """Rate and kept share in words."""
        seconds = max(time.monotonic() - self.started, 1e-3)
        share = 100 * self.kept / self.rows if self.rows else 0.0
        return f"{self.rows / seconds:,.1f} rows/s, kept {self.kept:,} ({share:.1f} %)"


class Screen:
    """Shows the events of a run; a context manager."""

    def __init__(self, console: Console, total_rows: int | None) -> None:
        """Prepare for a run over `total_rows` input rows, where known."""
        self._console = console
        self._total = total_rows
        self._all = Tally()
        self._shards: dict[str, tuple[Tally, TaskID]] = {}
        self._said = time.monotonic()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._overall = self._bars.add_task("all", total=total_rows, pace="")

    def __enter__(self) -> "Screen":
        """Start drawing."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self._bars.stop()

    def skipped(self, shard: str, rows: int) -> None:
        """A shard that was done before."""
        self._bars.update(self._overall, advance=rows)
        self._console.print(f"{shard}: done before", highlight=False)

    def show(self, event: Event) -> None:
        """Take note of an event."""
        if isinstance(event, Started):
            self._begin(event)
        elif isinstance(event, Batch):
            self._advance(event)
        else:
            self._end(event)

    def _begin(self, event: Started) -> None:
        begun = self._shards.pop(event.shard, None)
        if begun is not None:  # its worker died, and it is made anew
            tally, task = begun
            self._all.add(-tally.rows, -tally.kept)
            self._bars.update(self._overall, advance=-tally.rows)
            self._bars.remove_task(task)
        task = self._bars.add_task(event.shard, total=event.rows, pace="")
        self._shards[event.shard] = (Tally(), task)

    def _advance(self, event: Batch) -> None:
        tally, task = self._shards[event.shard]
        for each, bar in ((tally, task), (self._all, self._overall)):
            each.add(event.rows, event.kept)
            self._bars.update(bar, advance=event.rows, pace=each.pace())
        if not self._console.is_terminal and time.monotonic() - self._said > _LINE_EVERY_S:
            self.say(f"{self._all.rows:,} of {self._total or '?'} rows, {self._all.pace()}{self._left()}")

    def _end(self, event: Finished) -> None:
        known = self._shards.pop(event.shard, None)
        if known is not None:
            self._bars.remove_task(known[1])
        if event.manifest is None:
            why = "" if event.lost else f": {event.error}"  # what the whole run lost is told by its end
            self.say(f"{event.shard}: FAILED, a rerun tries it again{why}")
        else:
            pace = f", {known[0].pace()}" if known else ""
            self.say(f"{event.shard}: {event.manifest.rows_in:,} rows{pace}")

    def _left(self) -> str:
        if not self._total or not self._all.rows:
            return ""
        seconds = (time.monotonic() - self._all.started) * (self._total - self._all.rows) / self._all.rows
        return f", about {seconds / 60:,.0f} min left"

    def say(self, text: str) -> None:
        """Print a line."""
        self._said = time.monotonic()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
