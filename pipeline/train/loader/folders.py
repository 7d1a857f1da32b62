"""The folders of `make dataset`: their manifests, and whether their tars are what these say."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
_HASHING_THREADS = 8


class Part(NamedTuple):
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
        """The dataset's digest."""
        return dataset_digest(self.manifests)

    def listed(self) -> Iterator[tuple[Shard, Manifest]]:
        """The shards that hold samples."""
        for manifest in self.manifests:
            if manifest.kept:
                yield Shard(self.given, manifest.shard, self.shards / f"{manifest.shard}.tar", manifest.kept), manifest


def read_part(given: str) -> Part:
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
        manifests = [_manifest(shards / f"{name}.json") for name in finished_shards(names(shards))]
        part = Part(given, root, shards, sizes(shards), manifests)
    except OutputError as error:
        raise SourceError(f"{given} cannot be opened: {error}") from error
    except OSError as error:
        raise SourceError(f"{given} cannot be read: {error}") from error
    if not any(manifest.kept for manifest in part.manifests):
        lack = "no sample was kept" if part.manifests else "there is no finished shard"
        raise SourceError(f"{given} holds nothing to train on ({lack}): run `make dataset` with OUT={given} first.")
    return part


def _manifest(path: AnyPath) -> Manifest:
    text = path.read_bytes()
    try:
        manifest = Manifest.from_json(text)
        if manifest.to_json().encode() != text or manifest.shard != path.stem or not manifest.conserves_rows():
            raise CorruptShardError("it was changed since it was written")
        return manifest
    except CorruptShardError as error:
        raise SourceError(f"{path} is damaged ({error}): remove it and run `make dataset` again.") from error


def dataset_files(part: Part) -> dict[str, str]:
    """Name -> sha256 of the further files of a dataset, as dataset.json tells; empty where it is not there (yet).

    Raises:
        SourceError: when dataset.json is damaged.
    """
    with _reading(part):
        files = _dataset(part).get("files", {})
        return {name: str(told["sha256"]) for name, told in files.items()}


def check_manifests(part: Part) -> None:
    """Compare the manifests with what the dataset's last run told of them, where one came to its end.

    Raises:
        SourceError: when some are missing or were changed.
    """
    with _reading(part):
        told = _dataset(part).get("dataset_digest", part.digest)
    if told != part.digest:
        raise SourceError(
            f"The manifests of {part.given} are not those that {part.root / DATASET} was written for: copy the "
            f"dataset again (`python -m pipeline verify {part.given}` tells what differs), or train on what is there "
            "with --set data.verify=size."
        )


def _dataset(part: Part) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads((part.root / DATASET).read_bytes())
    except FileNotFoundError:
        return {}
    return told


@contextmanager
def _reading(part: Part) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise SourceError(f"{part.root / DATASET} is damaged: run `make dataset` again.") from error


def check_embedders(parts: Sequence[Part]) -> None:
    """Refuse shards whose vectors come from different models.

    Raises:
        SourceError: names two folders and the models.
    """
    for task in _EMBEDDERS:
        every = [(part.given, _used(task, manifest)) for part in parts for manifest in part.manifests]
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


def check_lengths(part: Part) -> None:
    """Compare the length of each tar with its manifest.

    Raises:
        SourceError: for the first tar that is missing or of another length.
    """
    for shard, manifest in part.listed():
        told, found = _told(manifest)["bytes"], part.sizes.get(f"{shard.name}.tar")
        if found is None:
            raise SourceError(f"{shard.tar} is missing, though its manifest is there: copy the dataset again.")
        if found != told:
            raise SourceError(f"{shard.tar} has {found} bytes, its manifest says {told}: copy the dataset again.")


def check_hashes(part: Part, on_shard: Callable[[str], None] | None = None) -> None:
    """Compare the sha256 of each tar with its manifest; `on_shard` hears the names.

    Raises:
        SourceError: for the first tar that differs.
    """
    listed = list(part.listed())
    with ThreadPoolExecutor(min(_HASHING_THREADS, os.cpu_count() or 1)) as pool:
        for (shard, manifest), found in zip(listed, pool.map(_sha256, (shard.tar for shard, _ in listed)), strict=True):
            if found != _told(manifest)["sha256"]:
                raise SourceError(
                    f"{shard.tar} is not the file of its manifest (sha256 {found[:12]}…): copy the dataset again, "
                    f"or make it anew; `python -m pipeline verify {part.given}` tells what is damaged."
                )
            if on_shard:
                on_shard(shard.name)


def _sha256(path: AnyPath) -> str:
    with path.open("rb") as stream:
        return sha256_of_stream(stream)


def _told(manifest: Manifest) -> dict[str, Any]:
    name = f"{manifest.shard}.tar"
    if name not in manifest.files:
        raise SourceError(f"The manifest of {manifest.shard} names no {name}: run `make dataset` again.")
    return manifest.files[name]
