"""The dataset that is trained on: finished shards of one or more folders, and what they all hold."""

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, combinations, islice
from typing import NamedTuple, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from pipeline.shared.files import AnyPath, names, sizes, to_path
from pipeline.shared.several import of_each
from pipeline.train.loader.shards import Raw, Shard, meta, samples, targets
from pipeline.train.settings import DataSettings
from schemas.arrays import Array
from schemas.digest import sha256, sha256_of_json, sha256_of_stream
from schemas.errors import CorruptShardError, OutputError, RemoteError, SourceError, first_line
from schemas.names import finished_shards
from schemas.shard import DATASET, UNCONDITIONAL, Manifest, as_npy, dataset_digest, either_form
from schemas.targets import Targets

_EMBEDDERS = ("face_embedder", "image_embedder")
"""Tasks whose models must be the same everywhere: their vectors are one adapter's input."""
T = TypeVar("T")

_HASHING_THREADS = 8
LOOKED_AT = 1000
"""Samples without a caption after which it is believed that there is none."""
_PEEKED = 4
"""Samples per plan whose files tell what its shards hold: a crop may be absent from one."""


class DatasetFolder(NamedTuple):
    given: str
    """As the user wrote it."""
    root: AnyPath
    """Where dataset.json lies."""
    shards: Sequence[Shard]
    """All that are finished, sorted by name."""
    digest: str
    files: dict[str, str]
    """Name -> sha256 of the further files, as dataset.json tells; empty where it is not there (yet)."""
    grouped_from: Sequence[str]
    """Digests of the datasets that `group` made this one of."""
    kinds: frozenset[str]
    """Of its sources, `web` and `made`; empty where dataset.json does not say."""


def read_folder(given: str, known: dict[str, DatasetFolder], *, manifests_may_differ: bool) -> DatasetFolder:
    """Find the finished shards of a folder: the OUT of a `dataset` run, or its `shards`; tars are measured, not hashed.

    One that is in `known`, which it comes into, is not read again. `manifests_may_differ` from those that the dataset's
    last run came to its end with.

    Raises:
        SourceError: when it does not exist, cannot be read, holds no finished shard with samples, or files of it are
            missing, were changed, or are of another length.
    """
    try:
        root = to_path(given)
        if not root.is_dir():
            trouble = "is no folder" if root.exists() else "does not exist"
            raise SourceError(f"{given} {trouble}: --from-shards takes the OUT folders of `make dataset`.")
        folder: AnyPath = root / "shards"
        if not folder.is_dir():
            root, folder = root.parent, root
        path = os.path.realpath(str(root))
        if path in known:
            return known[path]
        lengths, finished = sizes(folder), finished_shards(names(folder))
        manifests = of_each(folder, partial(_manifest, folder), finished)
        shards = [Shard(given, folder / f"{one.shard}.tar", one) for one in manifests]
    except OutputError as error:
        raise SourceError(f"{given or 'A DIR of --from-shards'} cannot be opened: {error}") from error
    except OSError as error:
        raise SourceError(f"{given} cannot be read: {first_line(error)}") from error
    if not any(shard.manifest.kept for shard in shards):
        lack, advice = "no sample was kept", "a dataset in which one was"
        if not shards:
            lack, advice = "there is no finished shard", "the OUT of a `make dataset` that has ended"
        if (folder / "run.json").exists():
            lack, advice = "it is a training run", f"a dataset, and --resume --out {given} to go on with the run"
        raise SourceError(f"{given} holds nothing to train on ({lack}): give {advice}.")
    for tar, manifest in ((shard.tar, shard.manifest) for shard in shards if shard.manifest.kept):
        if tar.name not in manifest.files:
            raise SourceError(f"The manifest of {manifest.shard} names no {tar.name}: run `make dataset` again.")
        expected, length = manifest.files[tar.name]["bytes"], lengths.get(tar.name)
        if length is None:
            raise SourceError(f"{tar} is missing, though its manifest is there: copy the dataset again.")
        if length != expected:
            raise SourceError(f"{tar} has {length} bytes, its manifest says {expected}: copy the dataset again.")

    digest, described = dataset_digest(shard.manifest for shard in shards), root / DATASET
    try:
        about = json.loads(described.read_bytes()) if described.exists() else {}
        same = about.get("dataset_digest", digest) == digest
        files = {name: str(entry["sha256"]) for name, entry in about.get("files", {}).items()}
        grouped_from = list(about.get("plan", {}).get("settings", {}).get("group", {}).get("of", ()))
        kinds = frozenset("made" if one.startswith("made:") else "web" for one in about.get("sources", ()))
    except RemoteError as error:
        raise SourceError(f"{given} cannot be read: {first_line(error)}") from error
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise SourceError(f"{described} is damaged: run `make dataset` again.") from error
    if not (same or manifests_may_differ):
        raise SourceError(
            f"The manifests of {given} are not those that {described} was written for: copy the dataset again (`python "
            f"-m pipeline verify {given}` tells what differs), or train on what is there with --set data.verify=size."
        )
    return known.setdefault(path, DatasetFolder(given, root, shards, digest, files, grouped_from, kinds))


def _manifest(folder: AnyPath, name: str) -> Manifest:
    path = folder / f"{name}.json"
    text = path.read_bytes()
    try:
        manifest = Manifest.from_json(text)
        if manifest.to_json().encode() != text or manifest.shard != name or not manifest.conserves_rows():
            raise CorruptShardError("it was changed since it was written")
    except CorruptShardError as error:
        raise SourceError(f"{path} is damaged ({error}): remove it and run `make dataset` again.") from error
    return manifest


def check_embedders(folders: Sequence[DatasetFolder]) -> None:
    for task in _EMBEDDERS:
        every = [(one.given, models_of(task, shard.manifest.models)) for one in folders for shard in one.shards]
        used = [entry for entry in every if entry[1]]
        for given, models in used:
            if models != used[0][1]:
                raise SourceError(
                    f"The {task.replace('_', ' ')} of {used[0][0]} is {', '.join(used[0][1])}, that of {given} "
                    f"{', '.join(models)}: train on datasets that were made with the same one."
                )


def models_of(task: str, models: Iterable[Mapping[str, str]]) -> list[str]:
    """Those of a task, by name with the beginning of their hashes."""
    return sorted({f"{one['name']} {one['sha256'][:12]}".strip() for one in models if one["task"] == task})


@dataclass(frozen=True)
class Dataset:
    """What can be trained on. All shards hold samples and were checked against their manifests."""

    shards: tuple[Shard, ...]
    """Folder by folder as given, sorted by name in each."""
    profiles: tuple[str, ...]
    """Profiles that the shards were made with, sorted."""
    models: tuple[dict[str, str], ...]
    """name, task, sha256 and licence of every model behind any shard, once each."""
    lineage: tuple[str, ...]
    """Each folder's dataset digest, and those of the datasets that it was grouped from."""
    digest: str
    """One digest over all."""
    unconditional: Mapping[str, Array]
    """Column -> features of an empty picture: `clip_hidden` (257, 1280), `dino` (257, D), float16; may be empty."""
    suffixes_of_plans: Mapping[str, frozenset[str]]
    """Plan digest -> suffixes of the files that its shards hold, those in int8 as npy; crops may be absent from single
    samples."""
    kinds: frozenset[str]
    """Of the sources, `web` and `made`; empty where that is not known of all."""
    targets: tuple[Targets, ...]
    """What latents and texts were precomputed by, without single cuts; one if all shards agree, none without."""
    notices: tuple[str, ...] = ()
    """A sentence for each thing of the folders that its user may not want."""

    @property
    def suffixes(self) -> frozenset[str]:
        """Those of the files that all shards hold."""
        return frozenset.intersection(*self.suffixes_of_plans.values())

    @property
    def folders(self) -> str:
        return " and ".join(dict.fromkeys(shard.folder for shard in self.shards))

    def without(self, suffix: str) -> "Dataset":
        """The shards that do not hold such a file."""
        plans = {plan: there for plan, there in self.suffixes_of_plans.items() if suffix not in there}
        shards = tuple(shard for shard in self.shards if shard.manifest.plan_digest in plans)
        return replace(self, shards=shards, suffixes_of_plans=plans)

    @property
    def samples(self) -> int:
        return sum(shard.manifest.kept for shard in self.shards)


def open_dataset(dirs: Sequence[str], data: DataSettings) -> Dataset:
    """Find the finished shards of `make dataset` outputs; tars are measured, not hashed.

    `dirs` are OUT folders, or their `shards` folders: paths or fsspec URLs. One that is named twice counts once.

    Raises:
        SourceError: when a folder holds no samples, a tar is not as long as its manifest says, or embedders differ.
    """
    if not dirs:
        raise SourceError("No dataset is given: --from-shards takes the OUT folders of `make dataset`.")
    known = dict[str, DatasetFolder]()
    read = [read_folder(given, known, manifests_may_differ=data.verify == "size") for given in dirs]
    folders = list(known.values())
    check_embedders(folders)
    names = [[given for given, one in zip(dirs, read, strict=True) if one is folder] for folder in folders]
    notices = [f"{' and '.join(many)} are one dataset, which counts once." for many in names if many[1:]]
    lineages = [(folder.given, {folder.digest, *folder.grouped_from}) for folder in folders]
    notices += [
        f"{one} and {other} hold the same photos, which count twice: one was grouped or copied from the other, or both "
        "from a third dataset."
        for (one, its), (other, others) in combinations(lineages, 2)
        if its & others
    ]
    digests = tuple(folder.digest for folder in folders)
    shards = tuple(shard for folder in folders for shard in folder.shards if shard.manifest.kept)
    # The first samples of one shard per plan; of all but their json it is only noted that they are there.
    one_per_plan = {shard.manifest.plan_digest: shard for shard in reversed(shards)}
    peeked = {
        plan: list(samples(shard, 0, _PEEKED, lambda suffix: suffix == "json")) for plan, shard in one_per_plan.items()
    }
    suffixes = {plan: as_npy(suffix for raw in raws for suffix in raw.files) for plan, raws in peeked.items()}
    made_by = [one for raws in peeked.values() for raw in raws if (one := targets(raw))]
    dataset = Dataset(
        shards=shards,
        profiles=tuple(sorted({shard.manifest.profile for shard in shards})),
        models=_distinct(model for shard in shards for model in shard.manifest.models),
        lineage=tuple(dict.fromkeys([*digests, *chain(*(folder.grouped_from for folder in folders))])),
        digest=digests[0] if len(digests) == 1 else sha256_of_json({str(i): one for i, one in enumerate(digests)}),
        unconditional=_unconditional(folders),
        suffixes_of_plans=suffixes,
        kinds=frozenset(chain(*(one.kinds for one in folders if all(each.kinds for each in folders)))),
        targets=_distinct(replace(one, latents={}) for one in made_by),
        notices=tuple(notices),
    )
    looked_at = chain(*peeked.values(), first_samples(dataset, LOOKED_AT))
    if not data.allow_no_captions and not any(str(meta(raw).get("text") or "").strip() for raw in looked_at):
        raise SourceError(
            f"None of the first {min(LOOKED_AT, dataset.samples):,} samples of {dataset.folders} has a caption: make "
            "the dataset again with the column that holds them (source.columns.text), or give --set "
            "data.allow_no_captions=true."
        )
    return dataset


def check_hashes(dataset: Dataset, rank: int = 0, ranks: int = 1, *, hashed_before: str | None = None) -> None:
    """Compare the sha256 of tars with their manifests: this process, `rank` of `ranks`, those of its share.

    `hashed_before` is the digest of a dataset that needs no second look.

    Raises:
        CorruptShardError: for the first tar that differs.
    """
    if dataset.digest == hashed_before:
        return
    shards = dataset.shards[rank::ranks]
    with ThreadPoolExecutor(min(_HASHING_THREADS, os.cpu_count() or 1)) as pool:
        for shard, digest in zip(shards, pool.map(_sha256, shards), strict=True):
            if digest != shard.manifest.files[shard.tar.name]["sha256"]:
                raise CorruptShardError(
                    f"{shard.tar} is not the file of its manifest (sha256 {digest[:12]}…): copy the dataset again, or "
                    f"make it anew; `python -m pipeline verify {shard.folder}` tells what is damaged."
                )


def _sha256(shard: Shard) -> str:
    with shard.tar.open("rb") as stream:
        return sha256_of_stream(stream)


def _distinct(values: Iterable[T]) -> tuple[T, ...]:
    distinct: list[T] = []
    for one in values:
        if one not in distinct:
            distinct.append(one)
    return tuple(distinct)


def _unconditional(folders: Sequence[DatasetFolder]) -> dict[str, Array]:
    """The features of the first folder that has them; all folders were made by the same models."""
    features: dict[str, Array] = {}
    for folder in folders:
        digest = folder.files.get(UNCONDITIONAL)
        if not digest:
            continue
        path = folder.root / UNCONDITIONAL
        wrong = f"{path} is not what dataset.json describes: run `python -m pipeline dataset` on {folder.given} again."
        try:
            data = path.read_bytes()
            mine: dict[str, Array] = load(data) if sha256(data) == digest else {}
        except RemoteError:
            raise
        except (OSError, SafetensorError) as error:
            raise SourceError(wrong) from error
        if not mine or not all(np.isfinite(values).all() for values in mine.values()):
            raise SourceError(wrong)
        features = mine | features
    return features


def first_samples(dataset: Dataset, count: int, suffixes: Collection[str] = ()) -> Iterator[Raw]:
    """The first samples in the order of the shards: json, and where the files of these suffixes are, in any form."""
    wanted = either_form({"json", *suffixes})
    every = (
        raw
        for shard in dataset.shards
        for raw in samples(shard, 0, count, lambda suffix: suffix == "json" if suffix in wanted else None)
    )
    return islice(every, count)
