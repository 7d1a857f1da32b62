"""Roles of a condition, the files that hold them, and what stands for "no face"."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pipeline.train.loader.dataset import Dataset, first_samples
from pipeline.train.loader.decode import features
from pipeline.train.loader.shards import Raw
from pipeline.train.settings import AdapterSettings, Condition, ImageEncoder
from schemas.errors import SourceError
from schemas.int8 import Quantised, dequantise
from schemas.shard import EMBEDDINGS

_COLUMNS: dict[ImageEncoder, dict[str, str]] = {
    "clip-vit-h": {"arcface": "arcface", "pooled": "clip", "hidden": "clip_hidden"},
    "dinov2": {"arcface": "arcface", "pooled": "dino", "hidden": "dino"},
}
"""Image encoder -> role -> column."""
_PLAIN: dict[Condition, str] = {"segmented": "", "plain": "_plain"}
"""Condition -> what the columns of its image features end in."""


@dataclass(frozen=True)
class Features:
    """The files that a variant's condition is read from, proved to be there, and what stands for "no face" in each."""

    pictures: tuple[Condition, ...]
    """Of which pictures of the face the image features are: one, or two between which each sample draws."""
    files: tuple[dict[str, str], ...]
    """For each picture: role -> suffix of the npy file; features in int8 go by it too."""
    shapes: Mapping[str, tuple[int, ...]]
    """Suffix -> shape of the first sample's file, which all others must have too."""
    unconditional: Mapping[str, npt.NDArray[Any]]
    """Role -> features of one sample: zeros for the ID vector and for CLIP's pooled features, and for token features
    and DINO's class token what the encoder makes of an empty picture."""

    @property
    def widths(self) -> dict[str, int]:
        """Width of the image encoder's tokens (`features`) and its pooled features (`pooled`), where they are read."""
        names = {"hidden": "features", "pooled": "pooled"}
        return {names[role]: self.shapes[suffix][-1] for role, suffix in self.files[0].items() if role in names}


def features_of(dataset: Dataset, reads: Sequence[str], adapter: AdapterSettings) -> Features:
    """Find what a condition is read from.

    Args:
        dataset: the shards.
        reads: roles that the variant reads.
        adapter: says whose features `pooled` and `hidden` are, and of which picture.

    Raises:
        SourceError: when shards lack a file, or the features of an empty picture; says what to make again.
        CorruptShardError: when the first sample is damaged.
    """
    encoder, all_columns = adapter.image_encoder, _COLUMNS[adapter.image_encoder]
    there = tuple(one for one, plain in _PLAIN.items() if f"{all_columns['hidden']}{plain}.npy" in dataset.suffixes)
    choices = {"auto": there or ("segmented",), "both": tuple(_PLAIN)}
    pictures: tuple[Condition, ...] = choices.get(adapter.condition) or (cast(Condition, adapter.condition),)
    columns = {role: all_columns[role] for role in reads}
    files = tuple(
        {role: f"{column}{'' if role == 'arcface' else _PLAIN[one]}.npy" for role, column in columns.items()}
        for one in pictures
    )
    # "No face" is what the encoder makes of an empty picture, or zeros.
    empty = {role for role in reads if role == "hidden" or (role == "pooled" and encoder == "dinov2")}
    for index, role in product(range(len(files)), reads):
        suffix = files[index][role]
        if suffix not in dataset.suffixes:
            how = "" if role == "arcface" else f" with --set models.image_embedder={encoder}"
            if any(f"{columns[role]}{plain}.npy" in dataset.suffixes for plain in _PLAIN.values()):
                how = f" with --set segment.condition={pictures[index]}"  # they are of the other picture
            if not dataset.suffixes & EMBEDDINGS:
                how = " with --set pack.embeddings=true"
            raise SourceError(f"The shards of {dataset.folders} have no {suffix}: make the dataset again{how}.")
        if role in empty and columns[role] not in dataset.unconditional:
            raise SourceError(
                f"There are no {columns[role]} features of an empty picture for {dataset.folders}: let "
                "`python -m pipeline dataset` finish on it, which writes unconditional.safetensors."
            )
    shapes = first_shapes(dataset, [suffix for each in files for suffix in each.values()])
    unconditional = {
        role: row(role, dataset.unconditional[columns[role]]) if role in empty else np.zeros(shapes[suffix], np.float32)
        for role, suffix in files[0].items()
    }
    return Features(pictures, files, shapes, unconditional)


def row(role: str, features: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A file's array as its role: `pooled` is the first token (the class token) of token features."""
    return features[0] if role == "pooled" and features.ndim == 2 else features


def stored_row(raw: Raw, role: str, suffix: str, shape: tuple[int, ...]) -> npt.NDArray[Any] | Quantised:
    """One sample's features of a role; in int8 where they are tokens that are stored so.

    Raises:
        CorruptShardError: names shard and key.
    """
    stored = features(raw, suffix, shape)
    if isinstance(stored, Quantised):
        if role != "pooled":
            return stored
        stored = dequantise(Quantised(stored.int8[:1], stored.scale[:1]))
    return row(role, stored)


def first_shapes(dataset: Dataset, suffixes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Suffix -> shape of that file in the first sample, which all others must have too.

    Raises:
        CorruptShardError: when it is damaged.
    """
    (first,) = first_samples(dataset, 1, suffixes)
    return {suffix: features(first, suffix).shape for suffix in suffixes}
