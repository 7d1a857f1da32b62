"""CPU time per sample that the loader reads: webdataset's own reader, and ours, from shards of files in real sizes."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from train_made import VISION, write_shards
from webdataset import WebDataset

from pipeline.shared.bases import find_base
from pipeline.train.loader.dataset import open_dataset
from pipeline.train.loader.loader import ShardLoader
from pipeline.train.settings import TrainConfig

BATCH = 8
SHUFFLED = 200
RESOLUTION = 512


def in_turn(folder: Path, samples: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds per sample for ID vector, CLIP hidden states and latents as batches, by who reads.

    `webdataset`, `fp16` and `paired` read the same files, `int8` those of pack.hidden = int8; the condition of `paired`
    is always of another photo. All read everything once before, to warm the page cache, and work in this process.
    """
    torch.set_num_threads(1)
    for hidden in ("fp16", "int8"):
        write_shards(folder / hidden, find_base("tiny"), RESOLUTION, samples, VISION[False], hidden)
    readers: dict[str, Callable[[], float]] = {
        "webdataset": lambda: webdataset(folder / "fp16"),
        "fp16": lambda: ours(folder / "fp16", samples),
        "int8": lambda: ours(folder / "int8", samples),
        "paired": lambda: ours(folder / "fp16", samples, pairs=1.0),
    }
    costs: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, read in readers.items():
            costs[name].append(1000 * read() / samples)
    return costs


def ours(out: Path, samples: int, pairs: float = 0.0) -> float:
    """CPU seconds."""
    data = {"verify": "size", "workers": 0, "shuffle": SHUFFLED, "batch_size": BATCH, "text": "captions"}
    config = TrainConfig.model_validate({"data": {**data, "pairs": pairs}})
    batches = iter(ShardLoader(open_dataset([str(out)], config.data), ("arcface", "hidden"), config))
    for _ in ("warm", "counted"):
        start, read = time.process_time(), 0
        while read < samples:
            read += len(next(batches))
    spent = time.process_time() - start
    batches.close()  # type: ignore[attr-defined]
    return spent * samples / read


def webdataset(out: Path) -> float:
    """CPU seconds."""
    names = ("arcface.npy", "clip_hidden.npy", "latents.portrait.npy", "json")
    tars = sorted(map(str, out.glob("shards/*.tar")))
    reader = WebDataset(tars, shardshuffle=False).decode().to_tuple(*names).shuffle(SHUFFLED).batched(BATCH)
    for _ in ("warm", "counted"):
        start = time.process_time()
        for *arrays, _ in reader:
            [torch.from_numpy(np.stack(column)) for column in arrays]
    return time.process_time() - start
