"""Who is passed on how a run goes: `status`, metrics, a file of events, and a hook such as a webhook (`watch`)."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from pipeline.dataset.config import WatchSettings
from pipeline.dataset.execute.early_words import EarlyWords
from pipeline.dataset.execute.make_shard import Event, Finished
from pipeline.dataset.execute.progress import RunScreen
from pipeline.dataset.out.ledger import LIVE
from pipeline.shared.events import EventFile, Hook
from pipeline.shared.files import AnyPath, RemotePath, write, writing
from schemas.errors import first_line
from schemas.names import shard_origin

_EVERY_S, _REMOTE_EVERY_S = 15.0, 60.0
"""How often numbers are passed on, and how often where OUT is a store; in the first minutes more often."""


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
        with writing(self._metrics):
            self._write_metrics(screen.tally.snapshot())
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
        if not shard_origin(event.shard)[1]:  # of second chances most fail again, which is no news
            for kind, words in self._words.of(now):
                self.warn(kind, words)
        if time.monotonic() > self._due:
            self._pass_on()

    def warn(self, kind: str, words: str) -> None:
        if kind not in self._warned:
            self._warned[kind] = words
            self._screen.say(f"WARNING: {words}")
            self._emit("warning", about=kind, text=words)

    def end(self, **facts: Any) -> None:
        self._is_open = False
        self._pass_on()
        self._emit("end", **facts)
        with suppress(OSError):  # of an OUT that is gone or read-only, which ended the run
            (self._out / LIVE).unlink(missing_ok=True)

    def _pass_on(self) -> None:
        now = {**self._screen.tally.snapshot(), "warnings": dict(self._warned)}
        every_s = _REMOTE_EVERY_S if isinstance(self._out, RemotePath) else _EVERY_S
        self._due = time.monotonic() + min(every_s, 1 + now["seconds"] / 4)
        self._emit("progress", **now)
        try:
            if self._is_open:  # at the end it is removed, and OUT may be gone
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
