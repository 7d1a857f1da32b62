"""Watching a run: RUN/metrics.jsonl, TensorBoard, and a bar on a terminal or plain lines elsewhere."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from pipeline.shared.atomic import write_atomically
from pipeline.train.settings import TrainConfig

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

T = TypeVar("T")

METRICS = "metrics.jsonl"
_LINE_EVERY_S = 15.0
"""Without a terminal, a line at most this often."""


class Pace(NamedTuple):
    """How fast some steps were."""

    samples_per_s: float
    data_wait: float
    """Share of the time that was spent waiting for the loader, 0 to 1."""


class StepClock:
    """Measures steps, and what they waited for data; checkpoints and validation between steps do not count.

    Time runs from the request for a batch to `stop`. On a GPU a step must be over when `stop` is called at a
    measurement, which reading its loss takes care of.
    """

    def __init__(self) -> None:
        """Nothing was measured yet."""
        self._since: float | None = None
        self._busy = self._waited = 0.0
        self._samples = 0

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, with the time that each took to come."""
        source = iter(batches)
        while True:
            asked = time.perf_counter()
            self._since = asked if self._since is None else self._since
            try:
                batch = next(source)
            except StopIteration:
                return
            self._waited += time.perf_counter() - asked
            yield batch

    def count(self, samples: int) -> None:
        """So many samples go into the current step."""
        self._samples += samples

    def stop(self) -> None:
        """The step is over."""
        if self._since is not None:
            self._busy += time.perf_counter() - self._since
            self._since = None

    def take(self) -> Pace:
        """The pace since the last `take`, once the step was stopped."""
        busy = max(self._busy, 1e-9)
        pace = Pace(self._samples / busy, min(self._waited / busy, 1.0))
        self._busy = self._waited = 0.0
        self._samples = 0
        return pace


class MetricsFile:
    """Lines of JSON, one per logged step."""

    def __init__(self, path: Path, start: int) -> None:
        """Go on after step `start`: lines of later steps, which will come again, and torn lines are dropped."""
        before = path.read_bytes() if path.exists() else b""
        kept = b"".join(line for line in before.splitlines(keepends=True) if _step_of(line) <= start)
        if kept != before:
            write_atomically(path, kept)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line; numbers that are not finite become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._stream.write(json.dumps({"step": step, **finite}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _step_of(line: bytes) -> float:
    """The step of a whole line, infinity for what is none."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, TypeError, LookupError):
        return math.inf


class Screen:
    """Where the run is, for people."""

    def __init__(self, console: Console, start: int, steps: int) -> None:
        """Show steps after `start` of `steps`."""
        self._console = console
        self._first, self._steps = start, steps
        self._begun = self._said = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=start, words="")
        self._bar.start()

    def step(self, step: int) -> None:
        """A step is done."""
        self._bar.update(self._task, completed=step)

    def show(self, step: int, loss: float, pace: Pace) -> None:
        """The last measurement."""
        words = f"loss {loss:.4f}, {pace.samples_per_s:,.1f} samples/s, data wait {100 * pace.data_wait:.1f} %"
        self._bar.update(self._task, words=words)
        due = time.monotonic() - self._said > _LINE_EVERY_S or step >= self._steps
        if due and not self._console.is_terminal:
            self._said = time.monotonic()
            self.say(f"step {step:,} of {self._steps:,}, {words}{self._left(step)}")

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _left(self, step: int) -> str:
        if step >= self._steps or step <= self._first:
            return ""
        seconds = (time.monotonic() - self._begun) * (self._steps - step) / (step - self._first)
        return f", about {seconds / 60:,.0f} min left"

    def close(self) -> None:
        """Stop drawing."""
        self._bar.stop()


class Watch:
    """Takes note of all that a loop tells, on the main process; elsewhere (`quiet`) of nothing. A context manager."""

    def __init__(self, root: Path, config: TrainConfig, start: int, console: Console, *, quiet: bool = False) -> None:
        """Watch a run from step `start` on, in its folder `root`, which exists."""
        self._config = config
        self._clock = StepClock()
        self._loss: Tensor | None = None
        self._batches = 0
        self._begun = time.monotonic()
        self._screen = None if quiet else Screen(console, start, config.steps)
        self._file = None if quiet else MetricsFile(root / METRICS, start)
        self._board = None if quiet else _board(root / "tensorboard", config, start)

    def __enter__(self) -> "Watch":
        """It watches from the beginning."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all files."""
        for open_one in (self._screen, self._file, self._board):
            if open_one is not None:
                open_one.close()

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, while the clock sees how long each takes to come."""
        return self._clock.timed(batches)

    def batch(self, loss: Tensor, samples: int) -> None:
        """A batch went forward and back; its loss is read only when it is logged, so that a GPU need not wait."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        self._batches += 1
        self._clock.count(samples)

    def step(self, step: int, *, lr: Tensor | float, grad_norm: Tensor | float | None, epoch: int) -> None:
        """An optimiser step is done; every `log_every` steps, and at the last, its metrics are written."""
        due = step % self._config.watch.log_every == 0 or step >= self._config.steps
        if not due or self._file is None or self._loss is None:
            self._clock.stop()
            if self._screen is not None:
                self._screen.step(step)
            return
        values = {"epoch": epoch, "loss": float(self._loss) / self._batches, "lr": float(lr)}
        if grad_norm is not None:
            values["grad_norm"] = float(grad_norm)
        self._clock.stop()
        self._log(step, values, self._clock.take())
        self._loss, self._batches = None, 0

    def _log(self, step: int, values: dict[str, float], pace: Pace) -> None:
        self.note(step, {**values, **pace._asdict(), "seconds": round(time.monotonic() - self._begun, 3)})
        if self._screen is not None:
            self._screen.step(step)
            self._screen.show(step, values["loss"], pace)

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Write further numbers of a step, such as those of validation."""
        if self._file is not None:
            self._file.write(step, values)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def _board(folder: Path, config: TrainConfig, start: int) -> "SummaryWriter | None":
    """TensorBoard's log, without what was logged after `start` before."""
    if not config.watch.tensorboard or find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start + 1)
