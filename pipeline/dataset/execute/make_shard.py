"""One shard from its seed rows to its manifest: fetch ahead, compute, write. Shared by all executors."""

import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import pyarrow.compute as pc
from threadpoolctl import threadpool_limits

from pipeline.dataset.execute.runner import Loaded, apply, apply_ahead, apply_all
from pipeline.dataset.execute.watchdog import LESS_GPU_MEMORY
from pipeline.dataset.out.ledger import by_stage_and_verdict
from pipeline.dataset.out.output import Output, ShardWriter
from pipeline.dataset.plan import Plan
from pipeline.dataset.rows import Rows, split_seeds
from pipeline.dataset.source.seeds import Seeds
from schemas.columns import KEPT
from schemas.errors import FaceShardsError, LostError, first_line, is_gpu_full
from schemas.shard import Manifest
from stages import Step
from stages.fetch.engine import FetchTimes
from stages.pixels import images

FETCH_ROWS = 32
"""Rows that leave the fetching together. Most are dropped there; the living go on in batches of `Plan.batch_rows`."""
METADATA = "metadata"
"""Names a shard where a part proves unreadable in the middle: nobody knows the shards that it would have given."""
_MOST_HELD = 64
"""Fetched batches that wait for living rows."""

In = TypeVar("In")
Out = TypeVar("Out")

Compute = Callable[[Iterator[Rows]], Iterator[Rows]]
"""The model steps over a shard's batches, order kept: a loop in this process, or calls of actors."""


@dataclass(frozen=True)
class Started:
    shard: str
    rows: int
    """Input rows of the shard."""
    captions: int = 0
    """Of these, with a caption."""


@dataclass(frozen=True)
class Advanced:
    shard: str
    outcomes: Counter[tuple[str, str]]
    """(stage, verdict) -> input rows that were finished since the last news."""
    microseconds: Counter[str] = field(default_factory=Counter)
    """Stage -> its time for them."""
    fetches: FetchTimes = field(default_factory=FetchTimes)
    """What was fetched by the shard's worker meanwhile."""


@dataclass(frozen=True)
class Finished:
    shard: str
    manifest: Manifest | None
    error: str = ""
    lost: bool = False
    """Whether no other shard would fare better: the run stops."""

    @staticmethod
    def failed(shard: str, error: BaseException) -> "Finished":
        """A shard that stays to be tried again. The traceback is for what nobody foresaw: a full disk needs none."""
        if isinstance(error, LostError):
            return Finished(shard, None, str(error), lost=True)
        if is_gpu_full(error):
            return Finished(shard, None, f"{first_line(error)}. {LESS_GPU_MEMORY}")
        foreseen = isinstance(error, FaceShardsError | OSError)
        text = f"{type(error).__name__}: {error}" if foreseen else "".join(traceback.format_exception(error)).strip()
        return Finished(shard, None, text)


Event = Started | Advanced | Finished
Execute = Callable[[Plan, Iterable[Seeds], Output], Generator[Event, None, None]]
"""Makes shards by a plan, whoever does the work."""


def load_models(plan: Plan) -> list[Loaded]:
    first_choice = None
    if plan.config.models.decoding == "gpu":
        from stages.pixels.nvjpeg import NvJpeg

        first_choice = NvJpeg()
    images.set_decoding(plan.pool.threads, first_choice)
    return load(plan, plan.pool.steps)


def load(plan: Plan, steps: tuple[Step, ...]) -> list[Loaded]:
    # One thread per call: more of them only wait for each other, and fill the cores that other workers have.
    threadpool_limits(1)
    return [Loaded(step.stage()(plan.config, plan.runtime), plan.keeps[step]) for step in steps]


def make_shard(plan: Plan, seeds: Seeds, output: Output, worker: "Worker", compute: Compute) -> Iterator[Event]:
    rows = split_seeds(seeds.table)
    size = plan.batch_rows
    starts = range(0, rows.alive.num_rows, FETCH_ROWS)
    batches = (Rows.living(rows.alive.slice(start, FETCH_ROWS)) for start in starts)
    captions = pc.sum(pc.greater(seeds.table["caption_chars"], 0)).as_py()
    yield Started(seeds.name, seeds.table.num_rows, captions or 0)
    with ShardWriter(output, seeds.name, plan) as writer:
        writer.add_tombstones(rows.dead)
        yield Advanced(seeds.name, by_stage_and_verdict(rows.dead))
        fetched = output.takedowns.without_contents(worker.fetched(batches))
        for done in compute(regrouped(fetched, size)):
            packed = apply_all(worker.write, done)
            writer.add(packed)
            outcomes = by_stage_and_verdict(packed.dead)
            outcomes[plan.steps[-1].stage().name, KEPT] += packed.alive.num_rows
            yield Advanced(seeds.name, outcomes, packed.microseconds, worker.take_times())
        yield Finished(seeds.name, writer.publish(seeds.table.num_rows))


class Worker:
    """What a process that makes shards holds: the stages around the models."""

    def __init__(self, plan: Plan) -> None:
        self._fetch = load(plan, plan.at("fetch"))
        self._most_rows = plan.config.executor.fetch_ahead * FETCH_ROWS
        self.write = load(plan, plan.at("write"))

    def close(self) -> None:
        for step in self._fetch:
            close = getattr(step.stage, "close", None)
            if close is not None:
                close()

    def take_times(self) -> FetchTimes:
        (take,) = (step.stage.take_times for step in self._fetch if hasattr(step.stage, "take_times"))
        times: FetchTimes = take()
        return times

    def fetched(self, batches: Iterator[Rows]) -> Iterator[Rows]:
        """Batches with their images, in order; those of many rows behind are being fetched meanwhile."""
        for step in self._fetch:
            if hasattr(step.stage, "stream"):
                batches = apply_ahead(step, batches, self._most_rows)
            else:
                batches = map(partial(apply, step), batches)
        return batches


def regrouped(batches: Iterator[Rows], size: int) -> Iterator[Rows]:
    """The same rows in order, with `size` living ones in each batch, or fewer where few live.

    Most rows are dropped before the models: calls for the few that are left of each batch would cost more than these.
    Some are made anyhow, so that a shard of which nothing is left has news too.
    """
    held: list[Rows] = []
    living = 0
    for rows in batches:
        held.append(rows)
        living += rows.alive.num_rows
        while living >= size:
            full, rest = Rows.joined(held).split(size)
            yield full
            held, living = [rest], living - size
        if len(held) > _MOST_HELD:
            yield Rows.joined(held)
            held, living = [], 0
    if held:
        yield Rows.joined(held)


def windowed(started: Iterator[In], finish: Callable[[In], Out], ahead: int) -> Iterator[Out]:
    """Results in order of what `started` starts at each of its steps, with up to `ahead` begun before their turn."""
    waiting: deque[In] = deque()
    for item in started:
        waiting.append(item)
        if len(waiting) > ahead:
            yield finish(waiting.popleft())
    while waiting:
        yield finish(waiting.popleft())
