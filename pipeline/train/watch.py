"""Watching a run: metrics.jsonl and history.jsonl in RUN, TensorBoard, a bar on a terminal or plain lines elsewhere."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from pipeline.shared.atomic import write_atomically
from pipeline.shared.events import EventFile, Hook, Warn
from pipeline.shared.terminal import Screen
from pipeline.train.settings import TrainConfig
from schemas.errors import first_line

if TYPE_CHECKING:
    from torch import Tensor  # takes seconds, and mistakes are told by `say`

T = TypeVar("T")

METRICS, HISTORY = "metrics.jsonl", "history.jsonl"
console = Console(markup=False, emoji=False)
_errors = Console(markup=False, emoji=False, stderr=True)


def say(text: str, *, from_any_process: bool = False) -> None:
    """A line on stderr, once for all processes of a run."""
    if from_any_process or os.environ.get("RANK", "0") == "0":
        _errors.print(text, highlight=False, soft_wrap=True)


def show(file: Path) -> None:
    """The path of a file that was written, on stdout."""
    console.print(str(file), highlight=False, soft_wrap=True)


def warn_once() -> Warn:
    """Says the first of each kind of trouble that does not stop a run."""
    warned: set[str] = set()

    def warn(kind: str, words: str) -> None:
        if kind not in warned:
            warned.add(kind)
            say(f"warning: {words}")

    return warn


@dataclass
class StepClock:
    """Measures steps, and what they waited for data; checkpoints and validation between steps do not count.

    Time runs from the request for a batch to `stop`. On a GPU a step must be over when `stop` is called at a
    measurement, which reading its loss takes care of.
    """

    _since: float | None = None
    _busy: float = 0.0
    _waited: float = 0.0
    _samples: int = 0

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; how long each is waited for is measured."""
        source = iter(batches)
        while True:
            begun = time.perf_counter()
            self._since = begun if self._since is None else self._since
            try:
                batch = next(source)
            except StopIteration:
                return
            self._waited += time.perf_counter() - begun
            yield batch

    def count(self, samples: int) -> None:
        self._samples += samples

    def stop(self) -> None:
        if self._since is not None:
            self._busy += time.perf_counter() - self._since
            self._since = None

    def take(self) -> dict[str, float]:
        """The pace since the last `take`, once the step was stopped.

        `samples_per_s`, and `data_wait`: which share of the time was spent waiting for the loader, 0 to 1.
        """
        busy = max(self._busy, 1e-9)
        pace = {"samples_per_s": self._samples / busy, "data_wait": min(self._waited / busy, 1.0)}
        self._busy = self._waited = 0.0
        self._samples = 0
        return pace


def drop_after(path: Path, start: int) -> None:
    """Drop lines of steps after `start` from a file of metrics, as they will come again, and lines that were torn."""
    before = path.read_bytes() if path.exists() else b""
    whole = b"".join(line for line in before.splitlines(keepends=True) if _step_of(line) <= start)
    if whole != before:
        write_atomically(path, whole)


def _step_of(line: bytes) -> float:
    """The step of a whole line, infinity for what is none."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, TypeError, LookupError):
        return math.inf


class Watch:
    """Writes down how a loop goes, on the main process; elsewhere (`quiet`) nothing. A context manager."""

    def __init__(
        self,
        root: Path,
        config: TrainConfig,
        start: int,
        console: Console,
        hook: Hook | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        """Watch a run from step `start` on, in its folder `root`, which exists."""
        self._config, self._hook, self._done = config, hook, start
        self.clock = StepClock()
        self._loss: Tensor | None = None
        self._batches = 0
        self._begun = time.monotonic()
        self._board: Any = None
        self._quiet = quiet
        if quiet:
            return
        self._screen = Screen(console, "train", "step {done:,} of {total}", config.steps, start)
        drop_after(root / METRICS, start)
        self._file, self._history = (EventFile(str(root / name), warn_once()) for name in (METRICS, HISTORY))
        if config.watch.tensorboard and find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            # Without what was logged after `start` before.
            self._folder = root / "tensorboard"
            self._board = SummaryWriter(str(self._folder), purge_step=start + 1)

    def __enter__(self) -> "Watch":
        if not self._quiet:
            self._screen.__enter__()
            self._happened("start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._quiet:
            return
        self._screen.__exit__()
        if error is None or isinstance(error, KeyboardInterrupt):
            self._happened("finished" if error is None and self._done >= self._config.steps else "stopped")
        else:
            self._happened("failed", first_line(error))
        self._onto_board(lambda board: board.close())
        for log in (self._file, self._history, self._hook):
            if log is not None:
                log.close()

    def _onto_board(self, write: Callable[[Any], object]) -> None:
        """A board that cannot be written is given up: what it lacks stands in RUN/metrics.jsonl."""
        try:
            if self._board is not None:
                write(self._board)
        except OSError as error:
            self._board = None
            say(f"warning: {self._folder} cannot be written, and the run goes on without it: {first_line(error)}.")

    def _happened(self, kind: str, words: str = "") -> None:
        """A line of RUN/history.jsonl."""
        event = {"time": round(time.time(), 3), "kind": kind, "step": self._done, "words": words}
        self._history.write(event)
        if self._hook is not None:
            self._hook.call(event)

    def batch(self, loss: "Tensor", samples: int) -> None:
        """A batch went forward and back; its loss is read only when it is logged, so that a GPU need not wait."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        self._batches += 1
        self.clock.count(samples)

    def step(self, step: int, *, lr: "Tensor | float", grad_norm: "Tensor | float | None", epoch: int) -> None:
        """An optimiser step is done; every `log_every` steps, and at the last, its metrics are written."""
        self._done = step
        due = step % self._config.watch.log_every == 0 or step >= self._config.steps
        words = None
        if due and not self._quiet and self._loss is not None:
            values = {"epoch": epoch, "loss": float(self._loss) / self._batches, "lr": float(lr)}
            if grad_norm is not None:
                values["grad_norm"] = float(grad_norm)
            self.clock.stop()
            values |= self.clock.take()
            self.note(step, {**values, "seconds": round(time.monotonic() - self._begun, 3)})
            rate, wait = f"{values['samples_per_s']:,.1f} samples/s", f"data wait {100 * values['data_wait']:.1f} %"
            words = f"loss {values['loss']:.4f}, {rate}, {wait}"
            self._loss, self._batches = None, 0
        self.clock.stop()
        if not self._quiet:
            self._screen.advance(1, words)

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Write further numbers of a step, such as those of validation."""
        if values:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._file.write({"step": step, **finite})
        if self._hook is not None:
            self._hook.call({"time": round(time.time(), 3), "kind": "metrics", "step": step, **values})

        def add(board: Any) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, step)

        self._onto_board(add)
