"""The events of a run on the screen: which shards are made, how fast, and how much is kept."""

import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import TaskID

from pipeline.dataset.execute.make_shard import Advanced, Event, Started
from pipeline.shared.terminal import Screen


@dataclass
class Tally:
    """What was done so far, of a shard or of all."""

    rows: int = 0
    kept: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, rows: int, kept: int) -> str:
        """Count finished rows; the rate and the kept share in words."""
        self.rows += rows
        self.kept += kept
        seconds = max(time.monotonic() - self.started, 1e-3)
        share = 100 * self.kept / self.rows if self.rows else 0.0
        return f"{self.rows / seconds:,.1f} rows/s, kept {self.kept:,} ({share:.1f} %)"


class RunScreen(Screen):
    """Shows the events of a run; a context manager."""

    def __init__(self, console: Console, total_rows: int | None) -> None:
        """Prepare for a run over `total_rows` input rows, where known."""
        super().__init__(console, "all", "{done:,} of {total} rows", total_rows)
        self._all = Tally()
        self._shards: dict[str, tuple[Tally, TaskID]] = {}

    def done_before(self, shard: str, rows: int) -> None:
        """Count a shard that an earlier run made."""
        self.skip(rows)
        self.say(f"{shard}: done before")

    def show(self, event: Event) -> None:
        """Draw, and say where a shard ends."""
        if isinstance(event, Advanced):
            tally, bar = self._shards[event.shard]
            self.bars.update(bar, advance=event.rows, words=tally.add(event.rows, event.kept))
            self.advance(event.rows, self._all.add(event.rows, event.kept))
            return
        known = self._shards.pop(event.shard, None)
        if known is not None:
            self.bars.remove_task(known[1])
        if isinstance(event, Started):
            if known is not None:  # its worker died, and it is made anew
                self.advance(-known[0].rows, self._all.add(-known[0].rows, -known[0].kept))
            self._shards[event.shard] = (Tally(), self.bars.add_task(event.shard, total=event.rows, words=""))
        elif event.manifest is None:
            why = "" if event.lost else f": {event.error}"  # what the whole run lost stands at its end
            self.say(f"{event.shard}: FAILED, a rerun tries it again{why}")
        else:
            pace = f", {known[0].add(0, 0)}" if known else ""
            self.say(f"{event.shard}: {event.manifest.rows_in:,} rows{pace}")
