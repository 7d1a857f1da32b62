"""How a run goes, for all who watch it: the screen, `status`, and whatever section `watch` of the config names."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import TaskID

from pipeline.dataset.config import WatchSettings
from pipeline.dataset.execute.early_words import EarlyWords
from pipeline.dataset.execute.make_shard import METADATA, Event, Finished, Started
from pipeline.dataset.execute.tally import Tally, details
from pipeline.dataset.out.ledger import LIVE
from pipeline.shared.events import EventFile, Hook
from pipeline.shared.files import AnyPath, RemotePath, write
from pipeline.shared.terminal import Screen
from schemas.errors import OutputError, first_line

_EVERY_S, _REMOTE_EVERY_S = 15.0, 60.0
"""How often numbers are passed on, and how often where OUT is a store; in the first minutes more often."""


class RunScreen(Screen):
    """Counts and shows the events of a run; a context manager. Shards get no line each: there are thousands."""

    def __init__(self, console: Console, total_rows: int | None) -> None:
        """Prepare for a run over `total_rows` input rows, where known."""
        super().__init__(console, "all", "{done:,} of {total} rows", total_rows)
        self.tally = Tally(total_rows)
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self.tally.begun = time.monotonic()  # what was started before is not this run's pace
        return super().__enter__()

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

    def show(self, event: Event) -> dict[str, Any]:
        """Take an event; what the run has come to by now."""
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
        now = self.tally.snapshot()
        kept = f"kept {now['kept']:,} ({100 * now['kept'] / max(1, now['rows']):.1f} %)"
        self.advance(now["rows"] - before, f"{now['rows_per_second']:,.1f} rows/s, {kept}")
        return now


class Watchers:
    """Passes on how a run goes, with early words; a context manager. No trouble of theirs stops a run."""

    def __init__(
        self,
        screen: RunScreen,
        out: AnyPath,
        settings: WatchSettings,
        watch: Callable[[Event], None] | None = None,
    ) -> None:
        """Open what the settings name; `watch` is called with each event as it is.

        Raises:
            UserError: when a file cannot be written, or the hook is not there.
        """
        self._screen, self._out, self._metrics, self._watch = screen, out, settings.metrics, watch
        self._due, self._is_open = 0.0, False
        self._words = EarlyWords()
        self._warned: dict[str, str] = {}
        self._hook = Hook(settings.hook, self.warn) if settings.hook else None
        try:
            self._write_metrics(screen.tally.snapshot())
        except OSError as error:
            raise OutputError(f"{self._metrics} cannot be written: {error.strerror or first_line(error)}.") from error
        self._file = EventFile(settings.events, self.warn) if settings.events else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_open:
            self.end(stopped_by=f"{kind.__name__}: {error}" if kind else "")
        hook, self._hook = self._hook, None
        if hook is not None:
            hook.close()
        if self._file is not None:
            self._file.close()

    def begin(self, **facts: Any) -> None:
        self._is_open = True
        self._emit("start", out=str(self._out), **facts)

    def take(self, event: Event) -> None:
        """Show an event, and pass on what it means."""
        now = self._screen.show(event)
        if self._watch is not None:
            self._watch(event)
        if isinstance(event, Finished) and event.manifest is None:
            self._emit("failed", shard=event.shard, error=event.error)
        elif isinstance(event, Finished) and event.manifest is not None:
            dropped = {reason: rows for reason, rows in event.manifest.dropped.items() if rows}
            self._emit(
                "shard", shard=event.shard, rows=event.manifest.rows_in, kept=event.manifest.kept, dropped=dropped
            )
        for kind, words in self._words.of(now):
            self.warn(kind, words)
        if time.monotonic() > self._due:
            self._pass_on(now)

    def warn(self, kind: str, words: str) -> None:
        """Say something once."""
        if kind not in self._warned:
            self._warned[kind] = words
            self._screen.say(f"WARNING: {words}")
            self._emit("warning", about=kind, text=words)

    def end(self, **facts: Any) -> None:
        self._is_open = False
        self._pass_on(self._screen.tally.snapshot())
        self._emit("end", **facts)
        with suppress(OSError):  # of an OUT that is gone or read-only, which ended the run
            (self._out / LIVE).unlink(missing_ok=True)

    def _pass_on(self, now: dict[str, Any]) -> None:
        now = {**now, "warnings": dict(self._warned)}
        every_s = _REMOTE_EVERY_S if isinstance(self._out, RemotePath) else _EVERY_S
        self._due = time.monotonic() + min(every_s, 1 + now["seconds"] / 4)
        self._emit("progress", **now)
        try:
            write(self._out / LIVE, json.dumps({"time": time.time(), **now}).encode())
            self._write_metrics(now)
        except OSError as error:
            self.warn("numbers", f"How the run goes cannot be written, and it goes on: {first_line(error)}.")

    def _write_metrics(self, now: dict[str, Any]) -> None:
        if self._metrics:
            from pipeline.dataset.execute.metrics import write_metrics  # its library is for those who want it

            write_metrics(self._metrics, now)

    def _emit(self, kind: str, **facts: Any) -> None:
        event = {"time": round(time.time(), 3), "kind": kind, **facts}
        if self._hook is not None:
            self._hook.call(event)
        if self._file is not None:
            self._file.write(event)
