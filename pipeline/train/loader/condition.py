"""Roles of a condition, the files that hold them, and what stands for "no face"."""

from collections.abc import Sequence
from typing import Any

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


def conditions(dataset: Dataset, adapter: AdapterSettings) -> tuple[Condition, ...]:
    """Of which pictures the image features are, in a run: one, or two between which each sample draws."""
    if adapter.condition in _PLAIN:
        return (adapter.condition,)
    column = _COLUMNS[adapter.image_encoder]["hidden"]
    there = tuple(one for one, plain in _PLAIN.items() if f"{column}{plain}.npy" in dataset.suffixes)
    return tuple(_PLAIN) if adapter.condition == "both" else there or ("segmented",)


def require(dataset: Dataset, reads: Sequence[str], adapter: AdapterSettings) -> list[dict[str, str]]:
    """The files of each condition: role -> suffix (of the npy, also of features in int8); all are known to be there.

    Args:
        dataset: the shards.
        reads: roles that the variant reads.
        adapter: says whose features `pooled` and `hidden` are, and of which picture.

    Raises:
        SourceError: when shards lack a file, or the features of an empty picture; says what to make again.
    """
    return [_files(dataset, reads, adapter.image_encoder, condition) for condition in conditions(dataset, adapter)]


def _files(dataset: Dataset, reads: Sequence[str], encoder: ImageEncoder, condition: Condition) -> dict[str, str]:
    columns = {role: _COLUMNS[encoder][role] for role in reads}
    files = {role: f"{column}{'' if role == 'arcface' else _PLAIN[condition]}.npy" for role, column in columns.items()}
    for role, suffix in files.items():
        if suffix not in dataset.suffixes:
            how = "" if role == "arcface" else f" with --set models.image_embedder={encoder}"
            if any(f"{columns[role]}{plain}.npy" in dataset.suffixes for plain in _PLAIN.values()):
                how = f" with --set segment.condition={condition}"  # they are of the other picture
            if not dataset.suffixes & EMBEDDINGS:
                how = " with --set pack.embeddings=true"
            raise SourceError(f"The shards of {dataset.folders} have no {suffix}: make the dataset again{how}.")
        if _needs_features(role, encoder) and columns[role] not in dataset.unconditional:
            raise SourceError(
                f"There are no {columns[role]} features of an empty picture for {dataset.folders}: let "
                "`python -m pipeline dataset` finish on it, which writes unconditional.safetensors."
            )
    return files


def _needs_features(role: str, encoder: ImageEncoder) -> bool:
    """Whether "no face" is what the encoder makes of an empty picture, and not zeros."""
    return role == "hidden" or (role == "pooled" and encoder == "dinov2")


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


def unconditional(dataset: Dataset, reads: Sequence[str], adapter: AdapterSettings) -> dict[str, npt.NDArray[Any]]:
    """Role -> features of one sample that stand for "no face".

    Zeros for the ID vector and for CLIP's pooled features. For token features and DINO's class token: what the encoder
    makes of an empty picture.

    Raises:
        SourceError: as `require`.
        CorruptShardError: when the first sample is damaged.
    """
    encoder = adapter.image_encoder
    files = require(dataset, reads, adapter)[0]
    shapes = first_shapes(dataset, list(files.values()))
    return {
        role: row(role, dataset.unconditional[_COLUMNS[encoder][role]])
        if _needs_features(role, encoder)
        else np.zeros(shapes[suffix], np.float32)
        for role, suffix in files.items()
    }


def first_shapes(dataset: Dataset, suffixes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Suffix -> shape of that file in the first sample, which all others must have too.

    Raises:
        CorruptShardError: when it is damaged.
    """
    (first,) = first_samples(dataset, 1, {"json", *suffixes})
    return {suffix: features(first, suffix).shape for suffix in suffixes}


def widths(dataset: Dataset, adapter: AdapterSettings) -> dict[str, int]:
    """Width of the image encoder's tokens (`features`) and of its pooled features (`pooled`), where shards hold them.

    Raises:
        CorruptShardError: when the first sample is damaged.
    """
    encoder, plain = _COLUMNS[adapter.image_encoder], _PLAIN[conditions(dataset, adapter)[0]]
    columns = {"features": f"{encoder['hidden']}{plain}", "pooled": f"{encoder['pooled']}{plain}"}
    there = {name: f"{column}.npy" for name, column in columns.items() if f"{column}.npy" in dataset.suffixes}
    shapes = first_shapes(dataset, list(there.values()))
    return {name: shapes[suffix][-1] for name, suffix in there.items()}
