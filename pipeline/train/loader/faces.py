"""Faces of a dataset to draw images of, each with further photos of the person where the dataset knows any."""

from collections.abc import Sequence
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.train.loader.dataset import Dataset, first_samples
from pipeline.train.loader.pairs import person
from pipeline.train.loader.reading import features_of, stored_row
from pipeline.train.loader.shards import Raw, meta, picture
from pipeline.train.settings import AdapterSettings
from schemas.arrays import Array, Image
from schemas.columns import CROPS
from schemas.int8 import Quantised, dequantise

_FACE, _SIDE = "face.jpg", (224, 224)
_ENOUGH = (640, 640)
"""Pixels of a crop that are decoded, about: what a detector sees of it."""
_LOOKED_AT = 1000
"""Samples among which persons with several photos are looked for."""


class Photo(NamedTuple):
    """One sample's pictures, RGB."""

    key: str
    face: Image
    """(224, 224, 3): the aligned face."""
    crop: Image
    """(H, W, 3): the portrait, else the next larger crop that the sample has, else the aligned face."""


class Face(NamedTuple):
    """A photo whose face is the condition."""

    photo: Photo
    condition: dict[str, Tensor]
    """Role -> features of one sample, float32: arcface (512,), pooled (P,), hidden (257, D)."""
    others: Sequence[Photo]
    """Further photos of the person."""


def first_faces(
    dataset: Dataset, count: int, reads: Sequence[str], adapter: AdapterSettings, others: int = 0
) -> list[Face]:
    """A face of each of the first `count` persons in the order of the shards; fewer where there are fewer.

    Those of whom the first samples hold several photos come first, with up to `others` further ones; a photo of nobody
    known is a person of its own.
    """
    features = features_of(dataset, reads, adapter)
    files = features.files[0]
    raws = first_samples(dataset, _LOOKED_AT, [_FACE, *(f"{crop}.jpg" for crop in CROPS), *files.values()])
    several: list[list[Raw]] = []
    single: list[list[Raw]] = []
    for _, members in groupby(raws, key=lambda raw: (raw.shard.tar, person(raw))):
        some = list(islice(members, 1 + others))
        (several if len(some) > 1 else single).append(some)
        if len(several) == count or (not others and len(single) == count):
            break
    return [
        Face(
            _photo(raw),
            {role: _tensor(stored_row(raw, role, suffix, features.shapes[suffix])) for role, suffix in files.items()},
            [_photo(other) for other in rest],
        )
        for raw, *rest in (several + single)[:count]
    ]


def _tensor(stored: Array | Quantised) -> Tensor:
    return torch.from_numpy(dequantise(stored) if isinstance(stored, Quantised) else stored.astype(np.float32))


def _photo(raw: Raw) -> Photo:
    face = picture(raw, _FACE, _SIDE, _SIDE)
    crop = next((crop for crop in CROPS if f"{crop}.jpg" in raw.files), None)
    if crop is None:
        return Photo(raw.key, face, face)
    try:
        width, height = map(int, meta(raw)["crops"][crop]["size"])
    except (LookupError, TypeError, ValueError) as error:
        raise raw.corrupt("json", f"does not say how large {crop}.jpg is") from error
    return Photo(raw.key, face, picture(raw, f"{crop}.jpg", (width, height), _ENOUGH))
