"""The dataset that is trained on: shards of one or more folders, and what they all hold."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load

from pipeline.train.loader.decode import targets
from pipeline.train.loader.folders import (
    Part,
    check_embedders,
    check_hashes,
    check_lengths,
    check_manifests,
    dataset_files,
    read_part,
)
from pipeline.train.loader.shards import Raw, Shard, samples
from pipeline.train.settings import DataSettings
from schemas.digest import sha256, sha256_of_json
from schemas.errors import SourceError
from schemas.shard import UNCONDITIONAL, Manifest
from schemas.targets import Targets

T = TypeVar("T")

_PEEKED = 4
"""Samples per plan whose files tell what its shards hold: a crop may be absent from one."""


@dataclass(frozen=True)
class Dataset:
    """What can be trained on. All shards hold samples and were checked against their manifests."""

    shards: tuple[Shard, ...]
    """Folder by folder as given, sorted by name in each."""
    profiles: tuple[str, ...]
    """Profiles that the shards were made with, sorted."""
    models: tuple[dict[str, str], ...]
    """name, task, sha256 and licence of every model behind any shard, once each."""
    digests: tuple[str, ...]
    """Each folder's dataset digest."""
    digest: str
    """One digest over all."""
    unconditional: Mapping[str, npt.NDArray[Any]]
    """Column -> features of an empty picture: `clip_hidden` (257, 1280), `dino` (257, D), float16; may be empty."""
    suffixes: frozenset[str]
    """Suffixes of the files that all shards hold; crops may be absent from single samples."""
    targets: tuple[Targets, ...]
    """What latents and texts were precomputed by, without single cuts; one if all shards agree, none without."""

    @property
    def folders(self) -> str:
        """The folders, for people."""
        return " and ".join(dict.fromkeys(shard.folder for shard in self.shards))

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.kept for shard in self.shards)

    @property
    def licences(self) -> dict[str, str]:
        """Model name -> licence."""
        return {model["name"]: model["licence"] for model in self.models}


def open_dataset(
    dirs: Sequence[str],
    data: DataSettings,
    *,
    verified: Collection[str] = (),
    on_shard: Callable[[str], None] | None = None,
) -> Dataset:
    """Find and check the finished shards of `make dataset` outputs.

    Args:
        dirs: OUT folders, or their `shards` folders; paths or fsspec URLs.
        data: `verify` says whether tars are hashed or only measured.
        verified: dataset digests (`Dataset.digest`, or one of `.digests`) whose tars were hashed before.
        on_shard: hears the name of every tar that was hashed.

    Raises:
        SourceError: when a folder holds no samples, a tar is not what its manifest says, or embedders differ.
    """
    if not dirs:
        raise SourceError("No dataset is given: --from-shards takes the OUT folders of `make dataset`.")
    parts = [read_part(given) for given in dirs]
    check_embedders(parts)
    digests = tuple(part.digest for part in parts)
    total = digests[0] if len(digests) == 1 else sha256_of_json({str(index): one for index, one in enumerate(digests)})
    for part in parts:
        check_lengths(part)
        if data.verify == "sha256":
            check_manifests(part)
        if data.verify == "sha256" and not {part.digest, total} & set(verified):
            check_hashes(part, on_shard)
    return _described(parts, digests, total)


def _described(parts: Sequence[Part], digests: tuple[str, ...], total: str) -> Dataset:
    listed = [entry for part in parts for entry in part.listed()]
    manifests = [manifest for _, manifest in listed]
    peeked = [_peek(shard) for shard in _one_per_plan(listed)]
    suffixes = [frozenset(suffix for raw in raws for suffix in raw.files) for raws in peeked]
    return Dataset(
        shards=tuple(shard for shard, _ in listed),
        profiles=tuple(sorted({manifest.profile for manifest in manifests})),
        models=_distinct(model for manifest in manifests for model in manifest.models),
        digests=digests,
        digest=total,
        unconditional=_unconditional(parts),
        suffixes=frozenset.intersection(*suffixes),
        targets=_distinct(replace(told, latents={}) for raws in peeked for raw in raws if (told := targets(raw))),
    )


def _one_per_plan(listed: Iterable[tuple[Shard, Manifest]]) -> list[Shard]:
    first: dict[str, Shard] = {}
    for shard, manifest in listed:
        first.setdefault(manifest.plan_digest, shard)
    return list(first.values())


def _peek(shard: Shard) -> list[Raw]:
    """The first samples, of which only the json was read."""
    count = min(_PEEKED, shard.kept)
    return list(samples(shard, 0, count, lambda suffix: suffix == "json"))


def _distinct(found: Iterable[T]) -> tuple[T, ...]:
    distinct: list[T] = []
    for one in found:
        if one not in distinct:
            distinct.append(one)
    return tuple(distinct)


def _unconditional(parts: Sequence[Part]) -> dict[str, npt.NDArray[Any]]:
    """The features of the first folder that has them; all folders were made by the same models."""
    found: dict[str, npt.NDArray[Any]] = {}
    for part in parts:
        told = dataset_files(part).get(UNCONDITIONAL)
        if told:
            found = _checked_features(part, told) | found
    return found


def _checked_features(part: Part, told: str) -> dict[str, npt.NDArray[Any]]:
    path = part.root / UNCONDITIONAL
    wrong = f"{path} is not what dataset.json describes: run `python -m pipeline dataset` on {part.given} again."
    try:
        data = path.read_bytes()
        if sha256(data) != told:
            raise SourceError(wrong)
        features: dict[str, npt.NDArray[Any]] = load(data)
    except (OSError, SafetensorError) as error:
        raise SourceError(wrong) from error
    if not all(np.isfinite(values).all() for values in features.values()):
        raise SourceError(wrong)
    return features


def first_samples(dataset: Dataset, count: int, suffixes: Collection[str]) -> Iterator[Raw]:
    """The first samples in the order of the shards, undecoded, with the files of these suffixes.

    Raises:
        CorruptShardError: when a tar cannot be read.
    """
    every = (
        raw
        for shard in dataset.shards
        for raw in samples(shard, 0, min(count, shard.kept), lambda suffix: True if suffix in suffixes else None)
    )
    return islice(every, count)
