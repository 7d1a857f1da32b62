"""The folders of `make dataset`: their manifests, and whether their tars are what these say."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pipeline.shared.files import AnyPath, sizes, to_path
from pipeline.train.loader.shards import Shard
from schemas.errors import CorruptShardError, OutputError, SourceError
from schemas.names import finished_shards
from schemas.shard import DATASET, Manifest, dataset_digest

_EMBEDDERS = ("face_embedder", "image_embedder")
"""Tasks whose models must be the same everywhere: their vectors are one adapter's input."""


class DatasetFolder(NamedTuple):
    """One of the given folders."""

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


def read_folder(given: str, *, manifests_may_differ: bool) -> DatasetFolder:
    """Find the finished shards of a folder: the OUT of a `dataset` run, or its `shards`; tars are measured, not hashed.

    `manifests_may_differ` from those that the dataset's last run came to its end with.

    Raises:
        SourceError: when it does not exist, cannot be read, holds no finished shard with samples, or files of it are
            missing, were changed, or are of another length.
    """
    try:
        root = to_path(given)
        if not root.is_dir():
            raise SourceError(f"{given} does not exist: --from-shards takes the OUT folders of `make dataset`.")
        folder: AnyPath = root / "shards"
        if not folder.is_dir():
            root, folder = root.parent, root
        lengths = sizes(folder)
        shards = [Shard(given, folder / f"{name}.tar", _manifest(folder, name)) for name in finished_shards(lengths)]
    except OutputError as error:
        raise SourceError(f"{given} cannot be opened: {error}") from error
    except OSError as error:
        raise SourceError(f"{given} cannot be read: {error}") from error
    if not any(shard.kept for shard in shards):
        lack = "no sample was kept" if shards else "there is no finished shard"
        raise SourceError(f"{given} holds nothing to train on ({lack}): run `make dataset` with OUT={given} first.")
    for tar, manifest in ((shard.tar, shard.manifest) for shard in shards if shard.kept):
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
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise SourceError(f"{described} is damaged: run `make dataset` again.") from error
    if not (same or manifests_may_differ):
        raise SourceError(
            f"The manifests of {given} are not those that {described} was written for: copy the dataset again (`python "
            f"-m pipeline verify {given}` tells what differs), or train on what is there with --set data.verify=size."
        )
    return DatasetFolder(given, root, shards, digest, files, grouped_from)


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
    """Refuse shards whose vectors come from different models.

    Raises:
        SourceError: names two folders and the models.
    """
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
