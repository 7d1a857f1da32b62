"""What is read of each sample, and what is done to it; decided before step 0.

Roles of a condition, the files that hold them, and what stands for "no face"; targets and texts; augmentation.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal, cast

import numpy as np

from pipeline.train.loader.dataset import LOOKED_AT, Dataset, first_samples
from pipeline.train.loader.pairs import lonely
from pipeline.train.loader.shards import Raw, features, meta
from pipeline.train.settings import AdapterSettings, Condition, DataSettings, ImageEncoder, TrainConfig
from schemas.arrays import Array
from schemas.columns import CROPS
from schemas.errors import ConfigError, SourceError
from schemas.int8 import Quantised, dequantise
from schemas.shard import EMBEDDINGS, either_form
from schemas.targets import text_sha256, vae_sha256

_TEXT, _TEXT_POOLED = "text.npy", "text_pooled.npy"
_MIRRORS_FREELY = "arcface.npy"
"""Hardly changes when the face is mirrored."""
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
    unconditional: Mapping[str, Array]
    """Role -> features of one sample: zeros for the ID vector and for CLIP's pooled features, and for token features
    and DINO's class token what the encoder makes of an empty picture."""

    @property
    def widths(self) -> dict[str, int]:
        """Width of the image encoder's tokens (`features`) and its pooled features (`pooled`), where they are read."""
        names = {"hidden": "features", "pooled": "pooled"}
        return {names[role]: self.shapes[suffix][-1] for role, suffix in self.files[0].items() if role in names}


def features_of(dataset: Dataset, reads: Sequence[str], adapter: AdapterSettings) -> Features:
    """Find what a condition is read from, given the roles that the variant `reads`.

    Raises:
        SourceError: when shards lack a file, or the features of an empty picture; says what to make again.
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
            lacking = dataset.without(suffix)
            how = "" if role == "arcface" else f" with --set models.image_embedder={encoder}"
            if any(f"{columns[role]}{plain}.npy" in lacking.suffixes for plain in _PLAIN.values()):
                wanted = "both" if len(pictures) > 1 else pictures[index]
                how = f" with --set segment.condition={wanted}"  # they are of the other picture
            if not lacking.suffixes & EMBEDDINGS:
                how = " with --set pack.embeddings=true"
            raise SourceError(f"The shards of {lacking.folders} have no {suffix}: make the dataset again{how}.")
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


def row(role: str, features: Array) -> Array:
    """A file's array as its role: `pooled` is the first token (the class token) of token features."""
    return features[0] if role == "pooled" and features.ndim == 2 else features


def stored_row(raw: Raw, role: str, suffix: str, shape: tuple[int, ...]) -> Array | Quantised:
    """One sample's features of a role; in int8 where they are tokens that are stored so."""
    stored = features(raw, suffix, shape)
    if isinstance(stored, Quantised):
        if role != "pooled":
            return stored
        stored = dequantise(Quantised(stored.int8[:1], stored.scale[:1]))
    return row(role, stored)


def first_shapes(dataset: Dataset, suffixes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Suffix -> shape of that file in the first sample, which all others must have too."""
    (first,) = first_samples(dataset, 1, suffixes)
    return {suffix: features(first, suffix).shape for suffix in suffixes}


@dataclass(frozen=True)
class Reading:
    features: Features
    """What the condition is read from."""
    mirrored: Mapping[str, str]
    """Suffix -> that of the file for mirrored targets, where that is another one and anything is mirrored."""
    crops: tuple[str, ...]
    """Those that may be the target."""
    latents: bool
    """Targets are precomputed latents, not images."""
    text: Mapping[str, tuple[int, ...]]
    """Suffix -> shape of precomputed text embeddings: none, text.npy, or text_pooled.npy too."""
    flip: float
    """Probability of a mirrored target."""
    colour: float
    """Probability of changed colours."""
    alternatives: float
    """Probability of a further caption instead of the first."""
    faces: int
    """Most photos of a person whose ID vectors are one condition, side by side."""
    notices: tuple[str, ...]
    """Those of the dataset, and a sentence for each thing of the config that was switched off, and why."""

    @property
    def wanted(self) -> frozenset[str]:
        return either_form({"json", *self.text, *map(self.target, self.crops)}) | self.condition

    @property
    def condition(self) -> frozenset[str]:
        return either_form({*self.features.shapes, *self.mirrored.values()})

    def condition_file(self, role: str, *, plain: bool, mirror: bool) -> tuple[str, tuple[int, ...]]:
        """Suffix and shape of what a sample's condition is read from."""
        suffix = self.features.files[-1 if plain else 0][role]
        return self.mirrored.get(suffix, suffix) if mirror else suffix, self.features.shapes[suffix]

    def target(self, crop: str) -> str:
        """Suffix of a crop as a target."""
        return f"latents.{crop}.npy" if self.latents else f"{crop}.jpg"


def plan_reading(
    dataset: Dataset, reads: Sequence[str], config: TrainConfig, base: Path | None = None, faces: int = 1
) -> Reading:
    """Decide what is read of each sample, given the roles that the variant `reads`.

    Precomputed targets must be of the encoders of `base`, a diffusers folder; None takes them on trust. `faces` are the
    most ID vectors side by side that the variant takes.

    Raises:
        ConfigError: when there is nothing of another photo that the variant reads.
        SourceError: when the shards lack what the config or the variant asks for.
    """
    data, augment, notices = config.data, config.augment, [*dataset.notices]
    features = features_of(dataset, reads, config.adapter)
    latents = _precomputed("latents", dataset, data, base, notices)
    text = _precomputed("text", dataset, data, base, notices)
    texts = first_shapes(dataset, [suffix for suffix in (_TEXT, _TEXT_POOLED) if text and suffix in dataset.suffixes])
    if latents and not data.buckets:
        notices.append("data.buckets = false has no effect: precomputed latents are cut to buckets already.")
    notices += [
        *_alternatives_notices(dataset, data, texts),
        *_kinds_notices(dataset, data),
        *_pairs_notices(dataset, data, reads),
    ]

    # The condition has to follow what is done to the target; what it cannot follow is left out.
    of_images = [suffix for suffix in features.shapes if suffix != _MIRRORS_FREELY]
    mirrored = {suffix: suffix.replace(".npy", "_mirror.npy") for suffix in of_images}
    missing = [suffix for suffix in mirrored.values() if suffix not in dataset.suffixes]
    against = {}
    if latents:
        against["flip"] = "precomputed latents cannot be mirrored (data.latents = images could be)"
        against["colour"] = "precomputed latents have no colours to change (data.latents = images has)"
    elif missing:
        against["flip"] = (
            f"the shards have no {missing[0]}, which a mirrored target needs (make the dataset --with mirror)"
        )
    if of_images and not latents:
        against["colour"] = "the variant reads image features, which hold the colours of the face"
    notices += [f"augment.{name} is off: {why}." for name, why in against.items() if getattr(augment, name)]
    flip, colour = (0.0 if name in against else getattr(augment, name) for name in ("flip", "colour"))
    reading = Reading(
        features=features,
        mirrored=mirrored if flip else {},
        crops=tuple(name for name in CROPS if getattr(data.crops, name)),
        latents=latents,
        text=texts,
        flip=flip,
        colour=colour,
        alternatives=0.0 if texts else data.alternatives,
        faces=faces,
        notices=tuple(notices),
    )
    fitting = {*map(reading.target, reading.crops)}
    first = first_samples(dataset, LOOKED_AT, fitting)
    # Of fewer, all are read soon.
    if dataset.samples > LOOKED_AT and all(fitting.isdisjoint(raw.files) for raw in first):
        lack = (
            f"none of the first {LOOKED_AT:,} samples has a crop of data.crops ({', '.join(reading.crops)}): where no "
            "other has one, training ends once all are read."
        )
        reading = replace(reading, notices=(*notices, lack))
    return reading


def _alternatives_notices(dataset: Dataset, data: DataSettings, texts: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Where data.alternatives is without effect."""
    if texts and data.alternatives:
        yield "data.alternatives is off: texts are precomputed, of the first captions (data.text = captions)."
    elif data.alternatives and not any(meta(raw).get("text_alternatives") for raw in first_samples(dataset, LOOKED_AT)):
        yield (
            f"data.alternatives draws from nothing in the first {min(LOOKED_AT, dataset.samples):,} samples: they have "
            "no further captions (text_alternatives)."
        )


def _kinds_notices(dataset: Dataset, data: DataSettings) -> Iterator[str]:
    """Where data.kinds names a kind that no source has; a SourceError where it leaves no other."""
    shares = data.kinds.model_dump()
    for kind in shares.keys() - dataset.kinds if dataset.kinds else ():
        why = (
            f"no source of {dataset.folders} is marked as {kind} (`made:` before a word of SHARDS, or source.kind = "
            "made, marks those of AI-made images)."
        )
        if not any(shares[other] for other in dataset.kinds):  # before all is read in vain
            raise SourceError(f"data.kinds leaves nothing: {why}")
        if shares[kind] < 1:
            yield f"data.kinds.{kind} takes a share of nothing: {why}"


def _pairs_notices(dataset: Dataset, data: DataSettings, reads: Sequence[str]) -> Iterator[str]:
    """Which photos data.pairs and data.balance find no other for; raises as `plan_reading` and `lonely` do."""
    paired = data.pair_features
    if data.pairs and not any(paired == "both" or (role == "arcface") == (paired == "id") for role in reads):
        raise ConfigError(
            f"The variant reads {' and '.join(reads)} alone, so that data.pair_features = {paired} "
            "pairs nothing: give --set data.pair_features=both."
        )
    if data.pairs or data.balance == "person":
        photos, alone = lonely(dataset)
        yield (
            f"of {photos:,} photos that were looked at, {alone:,} ({alone / photos:.0%}) are the only one of their "
            "person: their condition is always their own."
        )


def _precomputed(
    what: Literal["latents", "text"], dataset: Dataset, data: DataSettings, base: Path | None, notices: list[str]
) -> bool:
    """Whether latents or texts come from the shards: where these have them, of this very base."""
    wish = data.latents if what == "latents" else data.text
    there = any(suffix.startswith("latents.") if what == "latents" else suffix == _TEXT for suffix in dataset.suffixes)
    if wish not in ("auto", "shards") or (wish == "auto" and not there):
        return False
    if not there:
        raise SourceError(
            f"The shards of {dataset.folders} hold no {what}: make the dataset again --with {what}, or give "
            f"--set data.{what}=auto."
        )
    against = None
    targets = dataset.targets[0] if len(dataset.targets) == 1 else None
    if targets is None:
        against = "not all shards were encoded for the same base and resolution"
    elif what == "latents" and targets.resolution != data.resolution:
        against = f"they are of resolution {targets.resolution}, data.resolution is {data.resolution}"
    elif base is not None:
        is_same = (
            targets.vae_sha256 == vae_sha256(base) if what == "latents" else targets.text_sha256 == text_sha256(base)
        )
        against = None if is_same else f"they were encoded by {targets.base}, whose weights are not those of {base}"
    if against and wish == "shards":
        raise SourceError(f"data.{what} = shards is not possible: {against}.")
    if against:
        notices.append(f"The precomputed {what} of the shards are not used: {against}.")
    return against is None
