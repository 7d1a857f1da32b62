"""Run a plan on Ray: shards as tasks that fetch and write, models in actors that load once. The only file with Ray.

Ray is the scheduler; what is done is known from the manifests alone. Only encoded images and Arrow tables travel
between processes. An actor that dies is started again by Ray, and what it was computing is computed again. A shard
whose task dies, or of which no batch gets done, is tried again by the driver: it is published whole or not at all, so
that another attempt is harmless.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    WorkerCrashedError,
)

from pipeline.dataset.config import ExecutorSettings
from pipeline.dataset.execute.make_shard import Event, Finished, Worker, load, make_shard, windowed
from pipeline.dataset.execute.runner import apply_all
from pipeline.dataset.execute.watchdog import overdue
from pipeline.dataset.out.output import Output
from pipeline.dataset.plan import Plan, Pool
from pipeline.dataset.rows import Rows
from pipeline.dataset.source.seeds import Seeds
from schemas.errors import ExitCode, LostError, PlanError, ShardError, first_line

_RETRIES = 3
"""Further attempts at a batch whose actor died, and at a shard whose task did."""
_OVERDUE_RETRIES = 1
"""Further attempts at a shard of which no batch got done: it may have waited for another one's, in the same actor."""
_REACH_S = 10.0
_TICK_S = 1.0
_HEARD_S = 20.0
"""How long the main thread may take to end a run whose node died."""
_IN_FLIGHT_PER_SHARD = 2
"""Batches of one shard in the models at a time: one is computed, the next lies ready."""
_DEATHS = (NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError)
"""What is raised for a process that died, as opposed to one that reports an error."""
_NODE = ("raylet", "gcs_server")


@contextmanager
def started(plan: Plan) -> Iterator[None]:
    """Ray for the time of a run: a local one for as many workers as the plan asks, or the cluster at ray_address.

    Raises:
        PlanError: when the cluster cannot be reached, or has fewer CPUs or GPUs than the plan's pools need.
        LostError: when a local one cannot be started.
    """
    done = threading.Event()
    threading.Thread(target=_end_without_node, args=(done,), name="node guard", daemon=True).start()
    try:
        _start(plan.config.executor)
        _require_resources(plan.pools())
        yield
    finally:
        ray.shutdown()
        done.set()


def _start(executor: ExecutorSettings) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if executor.ray_address:
        try:
            _require_reachable(executor.ray_address)
            ray.init(address=executor.ray_address, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            raise PlanError(f"Ray could not be joined: {first_line(error)}.") from error
    else:
        cpus = executor.workers + executor.gpus
        try:
            ray.init("local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        except Exception as error:  # it raises no more special one when a process of its node does not start
            raise LostError(f"Ray could not be started: {first_line(error)}.") from error


def _end_without_node(done: threading.Event) -> None:
    """End the process when its node died and the main thread does not hear of it, since it waits within Ray, or for it.

    Ray would wait for a minute, and then end the process without a word to the user, and with exit code 1.
    """
    while not done.wait(_TICK_S):
        if _node_is_dead() and not done.wait(_HEARD_S) and _node_is_dead():  # a run that ends lets its node die too
            sys.stderr.write(f"error: {_NODE_DIED}\n")
            sys.stderr.flush()
            os._exit(ExitCode.SHARDS_FAILED)


def _require_reachable(address: str) -> None:
    """Fail at once where nobody listens: Ray itself would try for a minute, and say so in many lines."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), _REACH_S).close()


def _require_resources(pools: Sequence[Pool]) -> None:
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for resource, need in (
        ("CPU", sum(pool.workers * pool.cpus for pool in pools)),
        ("GPU", sum(pool.workers * pool.gpus for pool in pools)),
    ):
        if need > have.get(resource, 0) + 1e-6:
            raise PlanError(
                f"The plan needs {need:g} {resource}, but Ray has {have.get(resource, 0):g}: "
                "lower executor.workers or executor.gpus."
            )


def run(plan: Plan, shards: Iterable[Seeds], output: Output) -> Generator[Event, None, None]:
    """Make the shards inside `started`, a bounded number at a time; news come as they happen.

    When this returns, or is closed, no process works on a shard any more.
    """
    pools = [[_actor(plan, pool) for _ in range(pool.workers)] for pool in plan.pools()]
    limit = max(pool.workers for pool in plan.pools()) + 1
    crew = _Crew(plan, output, pools)
    waiting = iter(shards)
    try:
        while True:
            while len(crew.running) < limit and (seeds := next(waiting, None)) is not None:
                crew.begin(_Attempt(seeds))
            if not crew.running:
                return
            yield from crew.news()
    except (LocalRayletDiedError, LostError):
        for attempt in crew.running.values():
            yield Finished.failed(attempt.seeds.name, LostError(_NODE_DIED))
    finally:
        ray.shutdown()


_NODE_DIED = (
    "The Ray node of this run died, so the run stops; finished shards are kept: see to it that the machine has memory "
    "to spare, and the same command goes on."
)


@dataclass
class _Attempt:
    """A shard that is being made."""

    seeds: Seeds
    deaths_left: int = _RETRIES
    overdue_left: int = _OVERDUE_RETRIES
    chosen: tuple[int, ...] = ()
    """Which actor of each pool it uses."""
    heard: float = field(default_factory=time.monotonic)
    """When something of it last got done."""


class _Crew:
    """The actors, and the tasks that use them."""

    def __init__(self, plan: Plan, output: Output, pools: Sequence[Sequence[Any]]) -> None:
        self._plan, self._output, self._pools = plan, output, pools
        self._busy = [[0] * len(pool) for pool in pools]
        self._patience = plan.config.executor.shard_timeout_s
        self.running: dict[Any, _Attempt] = {}
        """Stream of events -> the shard."""

    def begin(self, attempt: _Attempt) -> None:
        """Start a task that makes a shard, with the actors that have the least to do."""
        attempt.chosen = tuple(min(range(len(counts)), key=counts.__getitem__) for counts in self._busy)
        attempt.heard = time.monotonic()
        self._count(attempt, +1)
        stream = _make.remote(self._plan, attempt.seeds, self._output, self._actors(attempt))
        self.running[stream] = attempt

    def news(self) -> Iterator[Event]:
        """What happened meanwhile, if anything.

        Raises:
            LostError: when the node died.
        """
        _require_node()
        ready, _ = ray.wait(list(self.running), num_returns=1, timeout=min(_TICK_S, self._patience))
        for stream in ready:
            yield from self._event(stream)
        for stream, attempt in list(self.running.items()):
            late = time.monotonic() - attempt.heard > self._patience
            if late and not ray.wait([stream], num_returns=1, timeout=0)[0]:
                yield from self._give_up(stream)

    def _event(self, stream: Any) -> Iterator[Event]:
        """The next event of a shard's task; a stream that ends is over, and a task that died is started again."""
        attempt = self.running[stream]
        attempt.heard = time.monotonic()
        try:
            event: Event = ray.get(next(stream))
        except StopIteration:
            self._end(stream)
            yield Finished.failed(attempt.seeds.name, ShardError("its task ended before it was done"))
        except LocalRayletDiedError:
            raise
        except RayError as error:
            self._end(stream)
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, _DEATHS) and attempt.deaths_left:
                attempt.deaths_left -= 1
                self.begin(attempt)
            else:
                yield Finished.failed(attempt.seeds.name, cause)
        else:
            if isinstance(event, Finished):
                self._end(stream)
            yield event

    def _give_up(self, stream: Any) -> Iterator[Event]:
        """End a shard's task, replace the actors that it used, and let the shard have another try, or fail."""
        attempt = self._end(stream)
        ray.cancel(stream, force=True)
        for actor in self._actors(attempt):
            ray.kill(actor, no_restart=False)
        for other in self.running.values():
            if any(one == another for one, another in zip(attempt.chosen, other.chosen, strict=True)):
                other.heard = time.monotonic()  # what it waits for begins anew
        if attempt.overdue_left:
            attempt.overdue_left -= 1
            self.begin(attempt)
        else:
            yield Finished.failed(attempt.seeds.name, ShardError(overdue(self._patience)))

    def _end(self, stream: Any) -> _Attempt:
        attempt = self.running.pop(stream)
        self._count(attempt, -1)
        return attempt

    def _actors(self, attempt: _Attempt) -> list[Any]:
        return [pool[index] for pool, index in zip(self._pools, attempt.chosen, strict=True)]

    def _count(self, attempt: _Attempt, change: int) -> None:
        for counts, index in zip(self._busy, attempt.chosen, strict=True):
            counts[index] += change


def _require_node() -> None:
    """Notice at once that this machine's Ray is gone: Ray itself takes a minute, or ends this process without a word.

    Raises:
        LostError: when one of its processes ended.
    """
    if _node_is_dead():
        raise LostError(_NODE_DIED)


def _node_is_dead() -> bool:
    node = ray._private.worker._global_node  # nothing public tells
    if node is None:
        return _died_at_birth()
    return bool(node.head) and any(kind in _NODE for kind, _ in node.dead_processes())


def _died_at_birth() -> bool:
    """Whether a process of a node that is still being started ended: its parent has not asked for it yet."""
    with suppress(psutil.Error):
        children = psutil.Process().children()
        return any(child.name() in _NODE and child.status() == psutil.STATUS_ZOMBIE for child in children)
    return False


def _actor(plan: Plan, pool: Pool) -> Any:
    remote = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, max_restarts=-1, max_task_retries=_RETRIES)
    return remote(_Models).remote(plan, pool.name)


class _Models:
    """A model worker: loads the stages of its pool once."""

    def __init__(self, plan: Plan, pool_name: str) -> None:
        pool = next(pool for pool in plan.pools() if pool.name == pool_name)
        self._steps = load(plan, pool.steps)

    def apply(self, rows: Rows) -> Rows:
        """All steps of the pool on one batch."""
        return apply_all(self._steps, rows)


@ray.remote(num_cpus=0, max_retries=0, num_returns="streaming", scheduling_strategy="SPREAD")
def _make(plan: Plan, seeds: Seeds, output: Output, actors: Sequence[Any]) -> Iterator[Event]:
    yield from make_shard(plan, seeds, output, _worker(plan), _through(actors))


_workers: dict[str, Worker] = {}


def _worker(plan: Plan) -> Worker:
    """The worker of this process, made once: Ray runs many shards in one process."""
    if plan.digest not in _workers:
        _workers[plan.digest] = Worker(plan)
    return _workers[plan.digest]


def _through(actors: Sequence[Any]) -> Callable[[Iterator[Rows]], Iterator[Rows]]:
    """Send batches through one actor of each pool, a few in flight, and return them in order."""

    def start(rows: Rows) -> Any:
        reference: Any = rows
        for actor in actors:
            reference = actor.apply.remote(reference)
        return reference

    return lambda batches: windowed(map(start, batches), ray.get, _IN_FLIGHT_PER_SHARD)
