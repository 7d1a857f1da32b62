"""Ray itself, for the time of a run: a node of its own or a cluster that is joined, and a guard that sees it die."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError

from pipeline.dataset.config import ExecutorSettings
from pipeline.dataset.plan import Plan
from schemas.errors import ExitCode, LostError, PlanError, first_line
from stages.pixels.decoding import KEEP_MEMORY

_REACH_S = 10.0
TICK_S = 1.0
_NODES_EVERY_S = 5.0
"""How often the cluster's nodes are listed; Ray itself takes longer to see that one is dead."""
_CLUSTER_PATIENCE_S = 40.0
"""How long a cluster's head, or this machine's part of it, may be out of reach; Ray ends the process after a minute."""
_GRACE_S = 20.0
"""How long the main thread, which may wait within Ray, may take to end a run whose node died."""
NODE_DIED = (
    "The Ray node of this run died, so the run stops; finished shards are kept: see to it that the machine has memory "
    "to spare, and the same command goes on."
)


@contextmanager
def joined(plan: Plan) -> Iterator["NodeGuard"]:
    """Ray for the time of a run: a local one for as many workers as the plan asks, or the cluster at ray_address.

    Raises:
        PlanError: when the cluster cannot be reached, or cannot do it; see `require_fit`.
        LostError: when a local one cannot be started.
    """
    executor = plan.config.executor
    try:
        _start(executor)
        context = ray.get_runtime_context()
        nodes = _nodes()
        node = next(node for node in nodes if node["NodeID"] == context.get_node_id())
        head, _, port = context.gcs_address.rpartition(":")
        listening = (head.strip("[]"), int(port)), (node["NodeManagerAddress"], int(node["NodeManagerPort"]))
        guard = NodeGuard(listening, _nodes, _CLUSTER_PATIENCE_S if executor.ray_address else 0)
        try:
            require_fit(plan, nodes)
            yield guard
        finally:
            guard.stop()
    finally:
        ray.shutdown()


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def _start(executor: ExecutorSettings) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not executor.ray_address:
        cpus = executor.workers + executor.gpus
        os.environ.update(KEEP_MEMORY)  # for its workers: makers fault in a quarter of the pages
        try:
            ray.init("local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        except Exception as error:  # it raises no more special one when a process of its node does not start
            raise LostError(f"Ray could not be started: {first_line(error)}.") from error
        return
    if executor.ray_address.startswith("ray://"):
        raise PlanError(
            "Ray's client (ray://) cannot run this: on a machine of the cluster, give the head's HOST:PORT."
        )
    try:
        require_reachable(executor.ray_address)
        ray.init(address=executor.ray_address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise PlanError(f"Ray could not be joined: {first_line(error)}.") from error


def require_reachable(address: str) -> None:
    """Fail at once where nobody listens: Ray itself would try for a minute, and say so in many lines.

    Raises:
        OSError: when nobody does. An address without a port, such as `auto`, is left to Ray.
        ValueError: for a port that is none.
    """
    url = urlsplit(f"//{address}")  # which knows the brackets of IPv6
    if url.hostname and url.port:
        socket.create_connection((url.hostname, url.port), _REACH_S).close()


def require_fit(plan: Plan, nodes: Iterable[dict[str, Any]]) -> None:
    """See that Ray has room for all workers; on a cluster, which may grow, for one, while the others wait for nodes.

    Raises:
        PlanError: when it has not, or when the bundled sample's server is out of reach of a node.
    """
    if plan.runtime.sample_port and len({node["NodeManagerAddress"] for node in nodes if node["Alive"]}) > 1:
        raise PlanError(
            "The sample's pictures are served on this machine alone, but Ray has nodes on others: "
            "give other --shards, or leave --ray-address away."
        )
    pool = plan.pool
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    room = pool.workers
    for resource, per_worker in (("CPU", pool.cpus), ("GPU", pool.gpus)):
        need = per_worker * (1 if plan.config.executor.ray_address else pool.workers)
        if need > have.get(resource, 0) + 1e-6:
            raise PlanError(
                f"The plan needs {need:g} {resource}, but Ray has {have.get(resource, 0):g}: "
                "lower executor.workers or executor.gpus."
            )
        if per_worker:
            room = min(room, int((have[resource] + 1e-6) / per_worker))
    if room < pool.workers:
        sys.stderr.write(f"Ray has room for {room} of {pool.workers} workers; the others wait for nodes that join.\n")


class NodeGuard:
    """Looks every second, in a thread, whether Ray's processes of this node and of the cluster's head are there.

    Ray says nothing of it before a minute is over, and then ends the process with exit code 1. The main thread sees
    `is_lost`; where it waits within Ray, the guard ends the process.
    """

    def __init__(
        self, listening: Iterable[tuple[str, int]], nodes: Callable[[], list[dict[str, Any]]], patience_s: float
    ) -> None:
        """Begin to look at those who are `listening`; one of whom nothing was seen for `patience_s` is lost.

        `nodes` is `ray.nodes`, which must not be called while Ray's head is gone: it would wait for it.
        """
        self._listening, self._nodes, self._patience = tuple(listening), nodes, patience_s
        self._over = threading.Event()
        self.is_lost = False
        self.live_nodes: frozenset[str] = frozenset()
        """Ids of the cluster's nodes."""
        self.dead_nodes: frozenset[str] = frozenset()
        """Of those that died."""
        self._list_nodes()
        self._thread = threading.Thread(target=self._watch, name="node guard", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End, before Ray does."""
        self._over.set()
        self._thread.join(_REACH_S)

    def _list_nodes(self) -> None:
        lives = {node["NodeID"]: node["Alive"] for node in self._nodes()}
        self.live_nodes = frozenset(node for node, is_live in lives.items() if is_live)
        self.dead_nodes = frozenset(lives) - self.live_nodes

    def _watch(self) -> None:
        seen = nodes_seen = time.monotonic()
        while not self._over.wait(TICK_S):
            try:
                for address in self._listening:
                    socket.create_connection(address, _REACH_S).close()
                seen = time.monotonic()
                if seen - nodes_seen > _NODES_EVERY_S:
                    self._list_nodes()
                    nodes_seen = seen
            except RayError:
                continue  # Ray is going, as the run is
            except OSError:
                self.is_lost = time.monotonic() - seen >= self._patience
            if self.is_lost and not self._over.wait(_GRACE_S):
                sys.stderr.write(f"error: {NODE_DIED}\n")
                sys.stderr.flush()
                os._exit(ExitCode.SHARDS_FAILED)
