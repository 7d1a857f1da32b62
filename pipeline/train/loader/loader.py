"""The loader of one training process: its workers' streams in turn, resumable at every batch."""

import signal
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.shared.files import forget_network_loops
from pipeline.train.loader.batches import Batch
from pipeline.train.loader.dataset import Dataset
from pipeline.train.loader.pictures import preload
from pipeline.train.loader.reading import plan_reading
from pipeline.train.loader.stream import Consumer
from pipeline.train.settings import TrainConfig
from schemas.digest import sha256_of_json
from schemas.errors import ConfigError, FaceShardsError, SourceError, UserError

_WORKER_DIED = "DataLoader worker"
"""How torch's message of a dead worker begins."""
_GRACE_S = 60
"""A worker that was told to stop ends by itself when its parent has; if it hangs, it is ended after so long."""


class ShardLoader:
    """Yields batches without end, in an order that follows from seed, dataset, settings and number of processes."""

    def __init__(
        self,
        dataset: Dataset,
        variant_reads: Sequence[str],
        config: TrainConfig,
        *,
        rank: int = 0,
        world: int = 1,
        state: Mapping[str, Any] | None = None,
        base: Path | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Prove that the shards hold what is read; nothing is started yet.

        Args:
            dataset: the shards.
            variant_reads: roles of the variant's condition.
            config: of the run.
            rank: this process, from 0.
            world: training processes.
            state: `state_dict()` of a loader of the same run and rank, to go on with the batch after its last one.
            base: diffusers folder of the base, whose encoders precomputed targets must be of; None is trust.
            pin_memory: put batches into page-locked memory, for a GPU.

        Raises:
            SourceError: when the shards lack what is read, or hold fewer samples than there are processes.
            ConfigError: when `state` is of another order.
        """
        if dataset.samples < world:
            raise SourceError(f"{dataset.folders} holds {dataset.samples} samples, too few for {world} processes.")
        self.reading = plan_reading(dataset, variant_reads, config, base)
        # A worker without samples would have nothing to wait for.
        self.workers = min(config.data.workers, dataset.samples // world)
        self._streams = max(1, self.workers)
        self._dataset, self._config, self._rank, self._world = dataset, config, rank, world
        self._pin_memory = pin_memory
        self._order = self._digest()
        self._positions = [(0, 0)] * self._streams
        self._next = 0
        if state is not None:
            self._restore(state)

    def _digest(self) -> str:
        """What decides which batch comes when, and what is in it."""
        reading, config = self.reading, self._config.model_dump(mode="json")
        done = [reading.latents, list(reading.text), reading.flip, reading.colour, sorted(reading.files.values())]
        data = {name: value for name, value in config["data"].items() if name not in ("verify", "allow_embedded")}
        told = {name: config[name] for name in ("seed", "augment", "guidance")}
        who = [self._rank, self._world, self._streams]
        return sha256_of_json({**told, "data": data, "done": done, "who": who, "dataset": self._dataset.digest})

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state["order"] != self._order:
            raise ConfigError(
                "The place in the data cannot be returned to: dataset, seed, data settings, variant and number of "
                "processes must be those that the run was started with."
            )
        self._positions = [(int(epoch), int(index)) for epoch, index in state["positions"]]
        self._next = int(state["next"])

    def state_dict(self) -> dict[str, Any]:
        """What was delivered so far, whatever workers have read ahead; JSON-able."""
        return {"order": self._order, "positions": [list(place) for place in self._positions], "next": self._next}

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the first that was not delivered yet, without end.

        Raises:
            CorruptShardError: for a damaged sample; names shard and key.
            UserError: when a worker process was killed.
        """
        if not self.reading.latents and (self.reading.flip or self.reading.colour):
            preload()
        batches = iter(self._started())
        try:
            while True:
                found = _next(batches)
                if isinstance(found, FaceShardsError):
                    raise found
                yield self._delivered(found)
        finally:
            del batches  # ends the workers

    def _started(self) -> "DataLoader[Batch | FaceShardsError]":
        stream = _Stream(self._consumers(), self._positions, self._next)
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_same,
            worker_init_fn=_start_worker,
            pin_memory=self._pin_memory,
            # Else it would draw from torch's own generator, whose state is part of a checkpoint.
            generator=torch.Generator().manual_seed(0),
        )

    def _consumers(self) -> list[Consumer]:
        return [
            Consumer(
                self._dataset,
                self.reading,
                self._config,
                worker=worker,
                consumer=self._rank * self._streams + worker,
                consumers=self._world * self._streams,
            )
            for worker in range(self._streams)
        ]

    def _delivered(self, batch: Batch) -> Batch:
        worker, epoch, number = batch.position
        self._positions[worker] = (epoch, number + 1)
        self._next = (worker + 1) % self._streams
        return batch


def _next(batches: Iterator[Batch | FaceShardsError]) -> Batch | FaceShardsError:
    try:
        return next(batches)
    except (EOFError, ConnectionError) as error:
        # A worker was killed while it handed over a tensor's memory; torch notices later.
        raise _died("it broke off") from error
    except RuntimeError as error:
        raise worker_died(error) or error from error


def worker_died(error: RuntimeError) -> UserError | None:
    """What to tell the user when torch says that a loader process died; None for other errors.

    torch raises it wherever the training process happens to be, so callers of the loader may meet it too.
    """
    if not str(error).startswith(_WORKER_DIED):
        return None
    return _died(str(error).splitlines()[0])


def _died(how: str) -> UserError:
    return UserError(
        f"A loader process died ({how}): if memory or /dev/shm ran out, lower data.shuffle or "
        "data.workers; --resume goes on from the last checkpoint."
    )


class _Stream(IterableDataset[Batch | FaceShardsError]):
    """What a worker process runs: one consumer's stream. torch asks its workers in turn, beginning with its first."""

    def __init__(self, consumers: Sequence[Consumer], positions: Sequence[tuple[int, int]], first: int) -> None:
        self._consumers = consumers
        self._positions = list(positions)
        self._first = first

    def __iter__(self) -> Iterator[Batch | FaceShardsError]:
        info = get_worker_info()
        own = ((info.id if info else 0) + self._first) % len(self._consumers)
        try:
            yield from self._consumers[own].batches(*self._positions[own])
        except FaceShardsError as error:
            # As it is: torch would wrap the worker's traceback into the message. And on: torch waits for seconds for
            # a worker whose stream has ended.
            yield from repeat(error)


def _start_worker(_: int) -> None:
    """One thread per process, no network loops of the parent, and signals left to the parent.

    Launchers and clusters send SIGTERM to whole groups of processes, while the parent, to stop at the end of a step,
    may need another batch.
    """
    cv2.setNumThreads(0)
    forget_network_loops()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))


def _same(batch: Any) -> Any:
    return batch
