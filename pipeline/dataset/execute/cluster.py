"""Run a plan on Ray: actors that make a shard at a time, fetch and write, and actors with the models. All load once.

Only this file and `cluster_node` know Ray. It is the scheduler; what is done is known from the manifests alone. Only
encoded images and Arrow tables travel between processes. An actor whose process dies is started again by Ray, and what
it was computing is computed again; one whose node dies is replaced here, and until there is room for another, its
shards go to those that live. A shard whose maker dies, or of which no batch gets done, is tried again by the driver: it
is published whole or not at all, so that another attempt is harmless.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.dataset.execute.cluster_node import NODE_DIED, TICK_S, NodeGuard, joined
from pipeline.dataset.execute.make_shard import Event, Execute, Finished, Worker, load_models, make_shard, windowed
from pipeline.dataset.execute.runner import apply_all
from pipeline.dataset.execute.watchdog import overdue
from pipeline.dataset.out.output import Output
from pipeline.dataset.plan import Plan
from pipeline.dataset.rows import Rows
from pipeline.dataset.source.seeds import Seeds
from schemas.errors import LostError, ShardError, UserError

_RETRIES = 3
"""Further attempts at a batch whose actor died, and at a shard whose maker did."""
_OVERDUE_RETRIES = 1
"""Further attempts at a shard of which no batch got done: it may have waited for another one's, in the same actor."""
_PLACED_S = 60.0
"""How long a shard waits for an actor that is still to be placed, while others are ready."""
_IN_FLIGHT_PER_SHARD = 2
"""Batches of one shard in the models at a time: one is computed, the next lies ready."""
_MISTAKES = (UserError, ImportError)
"""Why models do not load that no other process would load either."""
_DEATHS = (NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError)
"""What is raised for a process that died, as opposed to one that reports an error."""


@contextmanager
def started(plan: Plan) -> Iterator[Execute]:
    with joined(plan) as guard:
        yield lambda plan, shards, output: run(plan, shards, output, guard)


def run(plan: Plan, shards: Iterable[Seeds], output: Output, guard: NodeGuard) -> Generator[Event, None, None]:
    """Make the shards inside `started`, a bounded number at a time; news come as they happen.

    When this returns, or is closed, no process works on a shard any more.

    Raises:
        LostError: when the node died, or no actor of the models can be had.
    """
    try:
        crew = _Crew(plan, output, guard)
        limit = max(plan.config.executor.workers, plan.pool.workers) + 1
        waiting = iter(shards)
        while True:
            while len(crew.running) < limit and (seeds := next(waiting, None)) is not None:
                crew.begin(_Attempt(seeds))
            if not crew.running:
                return
            yield from crew.news()
    except LocalRayletDiedError as error:
        raise LostError(NODE_DIED) from error
    finally:
        guard.stop()
        ray.shutdown()


@dataclass(eq=False)
class _Actor:
    handle: Any
    answer: Any
    """Reference to the id of its node, which comes once it is placed there and has loaded its models."""
    node: str = ""
    """That id as it last came."""
    shards: int = 0
    """How many use it."""

    @property
    def is_placed(self) -> bool:
        return self.answer is None


class _Actors:
    """The actors of the models. One that is lost is replaced by another, which waits until there is room for it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._all = [self._start() for _ in range(plan.pool.workers)]
        self._failures = 0
        """Starts that failed since one was placed."""
        self._changed = time.monotonic()
        """When the first was placed, or the last was lost."""

    def _start(self) -> _Actor:
        pool = self._plan.pool
        resources: dict[str, Any] = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "max_concurrency": pool.threads}
        options = ray.remote(**resources, max_restarts=-1, max_task_retries=_RETRIES)
        handle: Any = options(_Models).remote(self._plan)
        return _Actor(handle, handle.node_id.remote())

    def _placed(self) -> list[_Actor]:
        return [actor for actor in self._all if actor.is_placed]

    def choose(self) -> _Actor:
        """The one with the least to do, of those that are placed, if any is."""
        return min(self._placed() or self._all, key=lambda actor: actor.shards)

    def restart(self, actor: _Actor) -> None:
        """Give an actor that hangs a new process; whatever waits for it goes on to wait."""
        if actor in self._all:
            ray.kill(actor.handle, no_restart=False)
            actor.answer = actor.handle.node_id.remote()

    def _replace(self, actor: _Actor) -> None:
        """End an actor, if it lives, and start another; whatever waits for the old one gets an error."""
        ray.kill(actor.handle)
        self._all[self._all.index(actor)] = self._start()

    def refresh(self, dead_nodes: frozenset[str]) -> None:
        """See which are placed, and replace those whose node died.

        Raises:
            UserError: when the models cannot be loaded, and never were; an ImportError for want of a package.
            LostError: when the models cannot be loaded any more, or no actor got ready for long.
        """
        had_some = bool(self._placed())
        for actor in list(self._all):
            if not actor.is_placed and ray.wait([actor.answer], timeout=0)[0]:
                try:
                    actor.node, actor.answer, self._failures = ray.get(actor.answer), None, 0
                except (RayActorError, *_MISTAKES) as error:
                    self._failures += 1
                    if isinstance(error, RayTaskError) and not any(other.node for other in self._all):
                        raise error.cause from None
                    if self._failures > _RETRIES:
                        cause = str(error).strip().rpartition("\n")[2]
                        raise LostError(f"The models could not be loaded, so the run stops: {cause}") from error
                    self._replace(actor)
            if actor.node in dead_nodes:
                self._replace(actor)
        if bool(self._placed()) != had_some:
            self._changed = time.monotonic()
        patience = 3 * max(self._plan.config.executor.shard_timeout_s, _PLACED_S)
        if not self._placed() and time.monotonic() - self._changed > patience:
            raise LostError(
                f"No worker of the models got ready for {patience:g} s, so the run stops; finished shards are kept: "
                "see to it that Ray has room for one, and the same command goes on."
            )

    def is_late(self, actor: _Actor) -> bool:
        """Whether an actor was never placed, long after others were."""
        return not actor.node and bool(self._placed()) and time.monotonic() - self._changed > _PLACED_S


@dataclass
class _Attempt:
    seeds: Seeds
    deaths_left: int = _RETRIES
    overdue_left: int = _OVERDUE_RETRIES
    maker: Any = None
    """Handle of the `_Maker` that makes it."""
    node: str = ""
    """Id of the node on which that was started."""
    actor: _Actor = field(init=False)
    """With the models that compute it."""
    progress: float = field(default_factory=time.monotonic)
    """When something of it last got done."""


class _Crew:
    """The actors of the models, and those that make shards and use them."""

    def __init__(self, plan: Plan, output: Output, guard: NodeGuard) -> None:
        self._plan, self._output, self._guard = plan, output, guard
        self._actors = _Actors(plan)
        self._patience = plan.config.executor.shard_timeout_s
        self._idle: defaultdict[str, list[Any]] = defaultdict(list)
        """Node -> handles of its makers without a shard."""
        self._begun: Counter[str] = Counter()
        """Node -> shards that were begun there."""
        # A few shards alone keep a GPU's threads at work; of many, no more rows lie ready than these need.
        self._ahead = max(_IN_FLIGHT_PER_SHARD, plan.pool.threads // 4)
        self.running: dict[Any, _Attempt] = {}
        """Stream of events -> the shard."""

    def begin(self, attempt: _Attempt) -> None:
        attempt.actor = self._actors.choose()
        attempt.actor.shards += 1
        # Where fewest are made, and were, such as on a node that just joined; by a maker that idles there, if any does.
        busy = Counter(other.node for other in self.running.values())
        attempt.node = min(sorted(self._guard.live_nodes), key=lambda node: (busy[node], self._begun[node]))
        self._begun[attempt.node] += 1
        if self._idle[attempt.node]:
            attempt.maker = self._idle[attempt.node].pop()
        else:
            options: dict[str, Any] = {"scheduling_strategy": NodeAffinitySchedulingStrategy(attempt.node, soft=True)}
            # A byte of memory, since Ray draws a node at random for actors that ask for nothing at all.
            attempt.maker = ray.remote(num_cpus=0, memory=1, **options)(_Maker).remote(self._plan, self._output)
        attempt.progress = time.monotonic()
        self.running[attempt.maker.make.remote(attempt.seeds, attempt.actor.handle, self._ahead)] = attempt

    def _end(self, stream: Any) -> _Attempt:
        """Take a shard from its maker, which is free for another one."""
        attempt = self.running.pop(stream)
        attempt.actor.shards -= 1
        self._idle[attempt.node].append(attempt.maker)
        return attempt

    def _kill(self, stream: Any) -> _Attempt:
        """Take a shard from its maker, which ends."""
        attempt = self._end(stream)
        ray.kill(self._idle[attempt.node].pop())
        return attempt

    def news(self) -> Iterator[Event]:
        """What happened meanwhile, if anything; a LostError when the node died, or there is no actor of the models."""
        ready, _ = ray.wait(list(self.running), num_returns=1, timeout=min(TICK_S, self._patience))
        if self._guard.is_lost:
            raise LostError(NODE_DIED)
        self._actors.refresh(self._guard.dead_nodes)
        for stream in ready:
            yield from self._event(stream)
        for stream, attempt in list(self.running.items()):
            if self._actors.is_late(attempt.actor):
                self.begin(self._kill(stream))
                continue
            is_overdue = time.monotonic() - attempt.progress > self._patience
            if not is_overdue or ray.wait([stream], num_returns=1, timeout=0)[0]:
                continue
            self._kill(stream)
            self._actors.restart(attempt.actor)
            for other in self.running.values():
                if other.actor is attempt.actor:
                    other.progress = time.monotonic()  # what it waits for begins anew
            if attempt.overdue_left:
                attempt.overdue_left -= 1
                self.begin(attempt)
            else:
                yield Finished.failed(attempt.seeds.name, ShardError(overdue(self._patience)))

    def _event(self, stream: Any) -> Iterator[Event]:
        """The next event of a shard; a stream that ends is over, and a shard whose maker died is begun again."""
        attempt = self.running[stream]
        attempt.progress = time.monotonic()
        try:
            event: Event = ray.get(next(stream))
        except StopIteration:
            self._end(stream)
            yield Finished.failed(attempt.seeds.name, ShardError("its maker stopped before it was done"))
        except LocalRayletDiedError:
            raise
        except RayError as error:
            cause = getattr(error, "cause", None) or error
            is_death = isinstance(cause, _DEATHS)  # of the maker, or of a model that it waited for
            self._kill(stream) if is_death else self._end(stream)
            if is_death and attempt.deaths_left:
                self._idle.clear()  # whoever idles may have been on the same node
                attempt.deaths_left -= 1
                self.begin(attempt)
            else:
                yield Finished.failed(attempt.seeds.name, cause)
        else:
            if isinstance(event, Finished):
                self._end(stream)
            yield event


class _Models:
    def __init__(self, plan: Plan) -> None:
        self._mistake: UserError | ImportError | None = None
        try:
            self._steps = load_models(plan)
        except _MISTAKES as error:  # Ray would write the trace of what ends an actor's start, and start it again
            self._mistake = error

    def node_id(self) -> str:
        """Where it was placed; raises why it could not load the models: a UserError, or an ImportError."""
        if self._mistake:
            raise self._mistake
        node_id: str = ray.get_runtime_context().get_node_id()
        return node_id

    def apply(self, rows: Rows) -> Rows:
        """All its steps on one batch; runs in `Pool.threads` threads at a time."""
        if self._mistake:
            raise self._mistake
        return apply_all(self._steps, rows)


class _Maker:
    """Makes one shard after the other. An actor: tasks lost their processes, and all they had imported, in between."""

    def __init__(self, plan: Plan, output: Output) -> None:
        self._plan, self._output = plan, output
        self._worker = Worker(plan)

    @ray.method(num_returns="streaming")
    def make(self, seeds: Seeds, actor: Any, ahead: int) -> Iterator[Event]:
        """Make a shard; its batches go through the models' `actor`, `ahead` in flight, and come back in order."""

        def compute(batches: Iterator[Rows]) -> Iterator[Rows]:
            return windowed(map(actor.apply.remote, batches), ray.get, ahead)

        yield from make_shard(self._plan, seeds, self._output, self._worker, compute)
