"""The loader of one training process: its workers' streams in turn, resumable at every batch."""

import signal
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.shared.configfile import leaves
from pipeline.shared.files import forget_network_loops
from pipeline.train.loader.batches import Batch, albumentations
from pipeline.train.loader.dataset import Dataset
from pipeline.train.loader.reading import plan_reading
from pipeline.train.loader.stream import Consumer
from pipeline.train.settings import TrainConfig, without_free_keys
from schemas.digest import sha256_of_json
from schemas.errors import ConfigError, FaceShardsError, RemoteError, SourceError, UserError

_WORKER_DIED = "DataLoader worker"
"""How torch's message of a dead worker begins."""
_GRACE_S = 60
"""A worker that gets SIGTERM ends by itself when its parent has; if it hangs, it is ended after so long."""


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
        base: Path | None = None,
        faces: int = 1,
        pin_memory: bool = False,
    ) -> None:
        """Prove that the shards hold what is read; nothing is started yet.

        This is the training process `rank` of `world`. `variant_reads` and `faces` are the variant's; precomputed
        targets must be of the encoders of `base`, a diffusers folder, None is trust. `pin_memory` is for a GPU.

        Raises:
            SourceError: when the shards lack what is read, or hold fewer samples than there are processes.
        """
        if dataset.samples < world:
            raise SourceError(f"{dataset.folders} holds {dataset.samples} samples, too few for {world} processes.")
        self.reading = reading = plan_reading(dataset, variant_reads, config, base, faces)
        self.notices = reading.notices
        # A worker without samples would have nothing to wait for.
        self.workers = min(config.data.workers, dataset.samples // world)
        self._streams = max(1, self.workers)
        self._dataset, self._config, self._rank, self._world = dataset, config, rank, world
        self._pin_memory = pin_memory
        # What a sample becomes, and whose turn it is: all of it must stay when a run is resumed.
        settings = config.model_dump(mode="json")
        same = leaves({name: settings[name] for name in ("seed", "augment", "guidance", "data")})
        done = [reading.latents, list(reading.text), reading.flip, reading.colour, sorted(reading.features.shapes)]
        self._order = {**without_free_keys(same), "done": done, "dataset": dataset.digest}
        self._identity = self._identity_of(rank, world)
        # How samples are dealt out; the number of a batch means one in this order.
        self._deal = [self._streams, config.data.shuffle]
        self._positions = [(0, 0)] * self._streams
        self._next = 0

    def _identity_of(self, rank: int, world: int) -> str:
        return sha256_of_json({**self._order, "who": [rank, world]})

    def state_dict(self) -> dict[str, Any]:
        """What was delivered so far, whatever workers have read ahead; JSON-able."""
        return {
            "identity": self._identity,
            "deal": self._deal,
            "positions": [list(position) for position in self._positions],
            "next": self._next,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the batch after the last one of a loader of the same run and rank.

        With another number of workers or another shuffle buffer there is no such batch: the rest of the epoch is left
        out, and the next one begins.
        """
        self._require_order(state, self._identity)
        if state["deal"] == self._deal:
            self._positions = [(int(epoch), int(index)) for epoch, index in state["positions"]]
            self._next = int(state["next"])
            return
        self._begin_epoch_after([state], "data.workers or data.shuffle differ")

    def load_states_of(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on where the loaders of a run with another number of processes were: with the epoch after theirs.

        `states` are those of all of them, in the order of their ranks.
        """
        for rank, state in enumerate(states):
            self._require_order(state, self._identity_of(rank, len(states)))
        self._begin_epoch_after(states, "the number of processes differs")

    def _require_order(self, state: Mapping[str, Any], identity: str) -> None:
        if state["identity"] != identity:
            raise ConfigError(
                "The position in the data cannot be returned to: dataset, seed, data settings and variant must be "
                "those that the run was started with."
            )

    def _begin_epoch_after(self, states: Sequence[Mapping[str, Any]], why: str) -> None:
        epoch = 1 + max(int(epoch) for state in states for epoch, _ in state["positions"])
        self._positions, self._next = [(epoch, 0)] * self._streams, 0
        self.notices += (
            f"{why} from before, and with that the order of samples: it goes on with the beginning of epoch {epoch}.",
        )

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the first that was not delivered yet, without end.

        Raises:
            CorruptShardError: for a damaged sample; names shard and key.
            UserError: when a worker process was killed.
        """
        if self.reading.colour:
            albumentations()  # before processes are forked that would each load it
        first, consumers = self._rank * self._streams, self._world * self._streams
        streams = [
            Consumer(self._dataset, self.reading, self._config, worker, first + worker, consumers)
            for worker in range(self._streams)
        ]
        batches = iter(
            DataLoader(
                _Stream(streams, self._positions, self._next),
                batch_size=None,  # a Batch passes as it is
                num_workers=self.workers,
                worker_init_fn=_start_worker,
                pin_memory=self._pin_memory,
                # Else it would draw from torch's own generator, whose state is part of a checkpoint.
                generator=torch.Generator().manual_seed(0),
            )
        )
        try:
            while True:
                try:
                    batch = next(batches)
                except (RuntimeError, EOFError, ConnectionError) as error:
                    raise worker_died(error) or error from error
                if isinstance(batch, FaceShardsError | RemoteError):
                    raise batch
                worker, epoch, number = batch.position
                self._positions[worker] = (epoch, number + 1)
                self._next = (worker + 1) % self._streams
                yield batch
        finally:
            del batches  # ends the workers


def worker_died(error: Exception) -> UserError | None:
    """The error for the user when a loader process died; None for other errors.

    torch raises it wherever the training process happens to be, so callers of the loader may meet it too. A worker that
    is killed while it hands over a tensor's memory is an EOFError or a ConnectionError; torch notices later.
    """
    how = str(error).split("\n")[0] if isinstance(error, RuntimeError) else "it broke off"
    if isinstance(error, RuntimeError) and not how.startswith(_WORKER_DIED):
        return None
    return UserError(
        f"A loader process died ({how}): if memory or /dev/shm ran out, lower data.shuffle or data.workers; --resume "
        "goes on from the last checkpoint."
    )


class _Stream(IterableDataset[Batch | FaceShardsError | RemoteError]):
    """What a worker process runs: one consumer's stream. torch asks its workers in turn, beginning with its first."""

    def __init__(self, consumers: Sequence[Consumer], positions: Sequence[tuple[int, int]], first: int) -> None:
        self._consumers = consumers
        self._positions = list(positions)
        self._first = first

    def __iter__(self) -> Iterator[Batch | FaceShardsError | RemoteError]:
        info = get_worker_info()
        own = ((info.id if info else 0) + self._first) % len(self._consumers)
        try:
            yield from self._consumers[own].batches(*self._positions[own])
        except (FaceShardsError, RemoteError) as error:
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
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
