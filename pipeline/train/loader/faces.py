"""The first faces of a dataset, for validation."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.train.loader.condition import first_shapes, require, row
from pipeline.train.loader.dataset import Dataset, first_samples
from pipeline.train.loader.decode import array, meta, picture
from pipeline.train.settings import ImageEncoder

_FACE = "face.jpg"
_SIDE = 224


class Face(NamedTuple):
    """One sample's face."""

    key: str
    caption: str
    image: npt.NDArray[np.uint8]
    """(224, 224, 3) RGB: the aligned face."""
    condition: dict[str, Tensor]
    """Role -> features of one sample, float32: arcface (512,), pooled (P,), hidden (257, D)."""


def first_faces(dataset: Dataset, count: int, reads: Sequence[str], encoder: ImageEncoder) -> list[Face]:
    """The first `count` samples in the order of the shards; fewer where the dataset has fewer.

    Raises:
        SourceError: when the shards lack what `reads` asks for.
        CorruptShardError: names shard and key of a damaged sample.
    """
    files = require(dataset, reads, encoder)
    shapes = first_shapes(dataset, list(files.values()))
    found = []
    for raw in first_samples(dataset, count, {"json", _FACE, *files.values()}):
        features = {role: row(role, array(raw, suffix, shapes[suffix])) for role, suffix in files.items()}
        condition = {role: torch.from_numpy(values.astype(np.float32)) for role, values in features.items()}
        side = (_SIDE, _SIDE)
        found.append(Face(raw.key, str(meta(raw).get("text") or ""), picture(raw, _FACE, side, side), condition))
    return found
