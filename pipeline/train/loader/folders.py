"""The folders of `make dataset`: their manifests, and whether their tars are what these say."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from pipeline.shared.files import AnyPath, names, sizes, to_path
from pipeline.train.loader.shards import Shard
from schemas.digest import sha256_of_stream
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
    shards: AnyPath
    sizes: dict[str, int]
    """Name -> bytes of the files in `shards`."""
    manifests: list[Manifest]
    """Of the finished shards, sorted by name."""

    @property
    def digest(self) -> str:
        return dataset_digest(self.manifests)

    def listed(self) -> Iterator[tuple[Shard, Manifest]]:
        """The shards that hold samples."""
        for manifest in self.manifests:
            if manifest.kept:
                yield Shard(self.given, manifest.shard, self.shards / f"{manifest.shard}.tar", manifest.kept), manifest


def read_folder(given: str) -> DatasetFolder:
    """Find the finished shards of a folder: the OUT of a `dataset` run, or its `shards`.

    Raises:
        SourceError: when it does not exist, cannot be read, or holds no finished shard with samples.
    """
    try:
        root = to_path(given)
        if not root.is_dir():
            raise SourceError(f"{given} does not exist: --from-shards takes the OUT folders of `make dataset`.")
        shards: AnyPath = root / "shards"
        if not shards.is_dir():
            root, shards = root.parent, root
        manifests = []
        for name in finished_shards(names(shards)):
            path = shards / f"{name}.json"
            text = path.read_bytes()
            try:
                manifest = Manifest.from_json(text)
                if manifest.to_json().encode() != text or manifest.shard != name or not manifest.conserves_rows():
                    raise CorruptShardError("it was changed since it was written")
            except CorruptShardError as error:
                raise SourceError(f"{path} is damaged ({error}): remove it and run `make dataset` again.") from error
            manifests.append(manifest)
        folder = DatasetFolder(given, root, shards, sizes(shards), manifests)
    except OutputError as error:
        raise SourceError(f"{given} cannot be opened: {error}") from error
    except OSError as error:
        raise SourceError(f"{given} cannot be read: {error}") from error
    if not any(manifest.kept for manifest in folder.manifests):
        lack = "no sample was kept" if folder.manifests else "there is no finished shard"
        raise SourceError(f"{given} holds nothing to train on ({lack}): run `make dataset` with OUT={given} first.")
    return folder


def dataset_files(folder: DatasetFolder) -> dict[str, str]:
    """Name -> sha256 of the further files of a dataset, as dataset.json tells; empty where it is not there (yet).

    Raises:
        SourceError: when dataset.json is damaged.
    """
    with _dataset(folder) as dataset:
        return {name: str(entry["sha256"]) for name, entry in dataset.get("files", {}).items()}


def grouped_from(folder: DatasetFolder) -> list[str]:
    """Digests of the datasets that `group` made this one of; none where it did not.

    Raises:
        SourceError: when dataset.json is damaged.
    """
    with _dataset(folder) as dataset:
        return list(dataset.get("plan", {}).get("settings", {}).get("group", {}).get("of", ()))


def check_manifests(folder: DatasetFolder) -> None:
    """Compare the manifests with the digest that the dataset's last run wrote, where one came to its end.

    Raises:
        SourceError: when some are missing or were changed.
    """
    with _dataset(folder) as dataset:
        digest = dataset.get("dataset_digest", folder.digest)
    if digest != folder.digest:
        raise SourceError(
            f"The manifests of {folder.given} are not those that {folder.root / DATASET} was written for: copy the "
            f"dataset again (`python -m pipeline verify {folder.given}` tells what differs), or train on what is there "
            "with --set data.verify=size."
        )


@contextmanager
def _dataset(folder: DatasetFolder) -> Iterator[dict[str, Any]]:
    """The content of dataset.json, nothing where there is none (yet); inside, what it lacks is damage."""
    path = folder.root / DATASET
    try:
        yield json.loads(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise SourceError(f"{path} is damaged: run `make dataset` again.") from error


def check_embedders(folders: Sequence[DatasetFolder]) -> None:
    """Refuse shards whose vectors come from different models.

    Raises:
        SourceError: names two folders and the models.
    """
    for task in _EMBEDDERS:
        every = [(folder.given, _used(task, manifest)) for folder in folders for manifest in folder.manifests]
        used = [entry for entry in every if entry[1]]
        for given, models in used:
            if models != used[0][1]:
                raise SourceError(
                    f"The {task.replace('_', ' ')} of {used[0][0]} is {', '.join(used[0][1])}, that of {given} "
                    f"{', '.join(models)}: train on datasets that were made with the same one."
                )


def _used(task: str, manifest: Manifest) -> list[str]:
    """The models of a task, with the beginning of their hashes."""
    models = [model for model in manifest.models if model["task"] == task]
    return sorted(f"{model['name']} {model['sha256'][:12]}".strip() for model in models)


def check_lengths(folder: DatasetFolder) -> None:
    """Compare the length of each tar with its manifest.

    Raises:
        SourceError: for the first tar that is missing or of another length.
    """
    for shard, manifest in folder.listed():
        expected, length = _tar_entry(manifest)["bytes"], folder.sizes.get(f"{shard.name}.tar")
        if length is None:
            raise SourceError(f"{shard.tar} is missing, though its manifest is there: copy the dataset again.")
        if length != expected:
            raise SourceError(f"{shard.tar} has {length} bytes, its manifest says {expected}: copy the dataset again.")


def wrong_hash(shard: Shard, manifest: Manifest) -> str | None:
    """What is wrong when the tar's sha256 is not that of its manifest."""
    with shard.tar.open("rb") as stream:
        sha256 = sha256_of_stream(stream)
    if sha256 == _tar_entry(manifest)["sha256"]:
        return None
    return (
        f"{shard.tar} is not the file of its manifest (sha256 {sha256[:12]}…): copy the dataset again, or make it "
        f"anew; `python -m pipeline verify {shard.folder}` tells what is damaged."
    )


def _tar_entry(manifest: Manifest) -> dict[str, Any]:
    name = f"{manifest.shard}.tar"
    if name not in manifest.files:
        raise SourceError(f"The manifest of {manifest.shard} names no {name}: run `make dataset` again.")
    return manifest.files[name]
