"""One shard from its seed rows to its manifest: fetch ahead, compute, write. Shared by all executors."""

import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar

from threadpoolctl import threadpool_limits

from pipeline.dataset.execute.runner import Loaded, apply_all
from pipeline.dataset.out.output import Output, ShardWriter
from pipeline.dataset.plan import Plan
from pipeline.dataset.rows import Rows, split_seeds
from pipeline.dataset.source.seeds import Seeds
from schemas.errors import FaceShardsError, LostError
from schemas.shard import Manifest
from stages import Step

FETCH_ROWS = 32
"""Rows that are fetched together. Most are dropped there; the living go on in batches of executor.batch_rows."""
_MOST_AHEAD = 256 << 20
"""Bytes of fetched images that wait for their turn, per process and shard."""
_FIRST_WEIGHT = _MOST_AHEAD >> 5
"""What the first batch is expected to weigh, while nothing is known."""
_MOST_HELD = 64
"""Fetched batches that wait for living rows."""

In = TypeVar("In")
Out = TypeVar("Out")

Compute = Callable[[Iterator[Rows]], Iterator[Rows]]
"""The model steps over a shard's batches, order kept: a loop in this process, or calls of actors."""


@dataclass(frozen=True)
class Started:
    """A shard was begun."""

    shard: str
    rows: int
    """Input rows of the shard."""


@dataclass(frozen=True)
class Advanced:
    """News of a shard while it is made."""

    shard: str
    rows: int
    """Input rows that were finished since the last news."""
    kept: int
    """Of these, kept."""


@dataclass(frozen=True)
class Finished:
    """The end of a shard: its manifest, or why it failed."""

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
        foreseen = isinstance(error, FaceShardsError | OSError)
        text = f"{type(error).__name__}: {error}" if foreseen else "".join(traceback.format_exception(error)).strip()
        return Finished(shard, None, text)


Event = Started | Advanced | Finished
Execute = Callable[[Plan, Iterable[Seeds], Output], Generator[Event, None, None]]
"""Makes shards by a plan, whoever does the work."""


def load(plan: Plan, steps: tuple[Step, ...]) -> list[Loaded]:
    """Load stages, and their models, in this process."""
    # One thread per process: more of them only wait for each other, and fill the cores that other workers have.
    threadpool_limits(1)
    return [Loaded(step.stage()(plan.config, plan.runtime), plan.keep_after(step)) for step in steps]


def make_shard(plan: Plan, seeds: Seeds, output: Output, worker: "Worker", compute: Compute) -> Iterator[Event]:
    """Make and publish one shard, telling its progress batch by batch."""
    rows = split_seeds(seeds.table)
    size = plan.config.executor.batch_rows
    starts = range(0, rows.alive.num_rows, FETCH_ROWS)
    batches = (Rows.living(rows.alive.slice(start, FETCH_ROWS)) for start in starts)
    yield Started(seeds.name, seeds.table.num_rows)
    with ShardWriter(output, seeds.name, plan) as writer:
        writer.add_tombstones(rows.dead)
        yield Advanced(seeds.name, rows.dead.num_rows, 0)
        fetched = output.takedowns.without_contents(worker.fetched(batches))
        for done in compute(regrouped(fetched, size)):
            packed = apply_all(worker.write, done)
            writer.add(packed)
            yield Advanced(seeds.name, packed.alive.num_rows + packed.dead.num_rows, packed.alive.num_rows)
        yield Finished(seeds.name, writer.publish(seeds.table.num_rows))


class Worker:
    """What a process that makes shards holds: the stages around the models."""

    def __init__(self, plan: Plan) -> None:
        """Load the fetching and packing stages."""
        self._fetch = load(plan, plan.at("fetch"))
        self._ahead = plan.config.executor.fetch_ahead
        self.write = load(plan, plan.at("write"))

    def close(self) -> None:
        """Let go of the fetching stages' threads and connections."""
        for step in self._fetch:
            close = getattr(step.stage, "close", None)
            if close is not None:
                close()

    def fetched(self, batches: Iterator[Rows]) -> Iterator[Rows]:
        """Batches with their images, several being fetched at a time, in order."""
        return ordered_ahead(lambda rows: apply_all(self._fetch, rows), batches, self._ahead, _nbytes)


def _nbytes(rows: Rows) -> int:
    weight: int = rows.alive.nbytes
    return weight


def regrouped(batches: Iterator[Rows], size: int) -> Iterator[Rows]:
    """The same rows in order, with `size` living ones in each batch, or fewer where few live.

    Most rows are dropped before the models: calls for the few that are left of each batch would cost more than these.
    Some are made anyhow, so that a shard of which nothing is left is heard of.
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


def ordered_ahead(
    function: Callable[[In], Out], items: Iterator[In], ahead: int, weight: Callable[[Out], int] = lambda _: 0
) -> Iterator[Out]:
    """`map` in threads, results in order: up to `ahead` calls run before their turn.

    Nothing new is begun while those that are done and wait, and those under way, weigh more than _MOST_AHEAD bytes: a
    host that drips must not hold up the rows behind it, nor may these fill the memory meanwhile.
    """
    pool = ThreadPoolExecutor(ahead, thread_name_prefix="fetch")
    load = _Load()

    def work(item: In) -> Out:
        result = function(item)
        load.done(weight(result))
        return result

    waiting: deque[Future[Out]] = deque()
    try:
        for item in items:
            load.begun()
            waiting.append(pool.submit(work, item))
            while waiting and (len(waiting) > ahead or load.expected() > _MOST_AHEAD):
                result = waiting.popleft().result()
                load.taken(weight(result))
                yield result
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Load:
    """Bytes of results that wait, and what those under way will add, going by all before them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._held = self._under_way = 0
        self._count, self._total = 1, _FIRST_WEIGHT

    def begun(self) -> None:
        with self._lock:
            self._under_way += 1

    def done(self, weight: int) -> None:
        with self._lock:
            self._under_way -= 1
            self._held += weight
            self._count, self._total = self._count + 1, self._total + weight

    def taken(self, weight: int) -> None:
        with self._lock:
            self._held -= weight

    def expected(self) -> float:
        with self._lock:
            return self._held + self._under_way * self._total / self._count


def windowed(started: Iterator[In], finish: Callable[[In], Out], ahead: int) -> Iterator[Out]:
    """Results in order of what `started` starts when asked for its next, with up to `ahead` begun before their turn."""
    waiting: deque[In] = deque()
    for item in started:
        waiting.append(item)
        if len(waiting) > ahead:
            yield finish(waiting.popleft())
    while waiting:
        yield finish(waiting.popleft())
