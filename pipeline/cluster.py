"""Run a plan on Ray: shards as tasks that fetch and write, models in actors that load once. The only file with Ray.

Ray is the scheduler; what is done is known from the manifests alone. Only encoded images and Arrow tables travel
between processes. A task or actor that dies is started again by Ray; a shard is published whole or not at all, so
that a second attempt is harmless.
"""

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.plan import Plan, Pool
from pipeline.publish import Output
from pipeline.runner import Rows, apply_all
from pipeline.shard import Event, Finished, Worker, load, make_shard, windowed
from pipeline.source import Seeds
from schemas.errors import PlanError

_RETRIES = 3
_REACH_S = 10.0
_IN_FLIGHT_PER_SHARD = 2
"""Batches of one shard in the models at a time: one is computed, the next lies ready."""


@contextmanager
def started(plan: Plan) -> Iterator[None]:
    """Ray for the time of a run: a local one for as many workers as the plan asks, or the cluster at ray_address.

    Raises:
        PlanError: when the cluster cannot be reached, or has fewer CPUs or GPUs than the plan's pools need.
    """
    executor = plan.config.executor
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if executor.ray_address:
            _require_reachable(executor.ray_address)
            ray.init(address=executor.ray_address, **quiet)
        else:
            ray.init(
                address="local",
                num_cpus=executor.workers + executor.gpus,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise PlanError(f"Ray could not be started or joined: {str(error).splitlines()[0]}.") from error
    try:
        _require_resources(plan.pools())
        yield
    finally:
        ray.shutdown()


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


def run(plan: Plan, shards: Iterable[Seeds], output: Output) -> Iterator[Event]:
    """Make the shards inside `started`, a bounded number at a time; news come as they happen."""
    pools = [[_actor(plan, pool) for _ in range(pool.workers)] for pool in plan.pools()]
    busy = [[0] * len(pool) for pool in pools]
    limit = max(pool.workers for pool in plan.pools()) + 1
    waiting = iter(shards)
    running: dict[Any, tuple[str, tuple[int, ...]]] = {}
    while True:
        while len(running) < limit and (seeds := next(waiting, None)) is not None:
            chosen = tuple(min(range(len(counts)), key=counts.__getitem__) for counts in busy)
            _count(busy, chosen, +1)
            actors = [pool[index] for pool, index in zip(pools, chosen, strict=True)]
            running[_make.remote(plan, seeds, output, actors)] = (seeds.name, chosen)
        if not running:
            return
        (ready,), _ = ray.wait(list(running), num_returns=1)
        event = _next_event(ready, running[ready][0])
        if event is None or isinstance(event, Finished):
            _count(busy, running.pop(ready)[1], -1)
        if event is not None:
            yield event


def _count(busy: list[list[int]], chosen: tuple[int, ...], change: int) -> None:
    for counts, index in zip(busy, chosen, strict=True):
        counts[index] += change


def _next_event(stream: Any, shard: str) -> Event | None:
    """The next event of a shard's task; an error ends the shard, and a stream that ends without one is over."""
    try:
        event: Event = ray.get(next(stream))
    except StopIteration:
        return None
    except RayError as error:
        return Finished.failed(shard, getattr(error, "cause", None) or error)
    return event


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


@ray.remote(num_cpus=0, max_retries=_RETRIES, num_returns="streaming", scheduling_strategy="SPREAD")
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
