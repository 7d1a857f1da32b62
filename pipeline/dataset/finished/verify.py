"""`verify`: whether every file of a dataset is what its manifest says, and every sample what the contract says."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from rich.console import Console

from pipeline.dataset.finished.contract import (
    IDENTITY,
    dataset_problems,
    ledger_problems,
    manifest_problems,
    tar_problems,
    unconditional_problems,
)
from pipeline.dataset.finished.report import REPORT
from pipeline.dataset.out.forgotten import FORGOTTEN, NEW, Forgotten, load
from pipeline.dataset.out.ledger import UNREADABLE, read_dataset, read_manifest, shard_names, shards_folder, summary
from pipeline.dataset.out.output import fingerprint
from pipeline.shared.atomic import TEMPORARY
from pipeline.shared.files import AnyPath, names, parquet
from pipeline.shared.several import of_each
from pipeline.shared.terminal import Screen
from schemas.columns import LEDGER_SCHEMA, complete
from schemas.errors import CorruptShardError, RemoteError
from schemas.names import finished_shards
from schemas.shard import CARD, CROISSANT, DATASET, EVENTS, UNCONDITIONAL, Manifest

_OURS = (DATASET, FORGOTTEN, UNCONDITIONAL, REPORT, CARD, CROISSANT, "shards", "drops", EVENTS)
_SUFFIXES = ("tar", "parquet", "json")


@dataclass(frozen=True)
class Problem:
    shard: str
    """Empty when it concerns the dataset as a whole."""
    file: str
    """Name below OUT/shards; of the dataset's own files, below OUT."""
    key: str | None
    """The sample, where it concerns one."""
    message: str


def verify(out: AnyPath, shown_on: Console | None = None) -> list[Problem]:
    """Check all finished shards of OUT, on all cores; `shown_on` is told how far it is.

    Whatever is wrong with files below OUT is a problem in the list, never an exception. Bytes that are not those of the
    manifest are a problem of their file: what is inside them proves nothing more.

    Raises:
        OutputError: when OUT is no dataset.
    """
    problems: list[Problem] = []
    manifests: list[Manifest] = []
    shards = shard_names(out)
    known = {None, *shards}
    if any((out / "shards").glob(f"{NEW}*.json")):
        problems.append(Problem("", "shards", None, "`forget` was killed: give it DIR alone, and it goes on"))
    try:
        forgotten = load(out)
    except (CorruptShardError, OSError) as error:
        forgotten = None  # what is to be forgotten, nobody knows
        problems.append(Problem("", FORGOTTEN, None, str(error).removeprefix(f"{FORGOTTEN}: ")))
    embeddings = None
    with suppress(CorruptShardError, OSError, KeyError):  # a problem of dataset.json, below
        embeddings = read_dataset(out)["plan"]["settings"].get("pack", {}).get("embeddings", True)

    def checked(shard: str) -> tuple[Manifest | None, list[Problem]]:
        try:
            manifest = read_manifest(out, shard)
        except (CorruptShardError, RemoteError) as error:
            return None, [Problem(shard, f"{shard}.json", None, str(error).removeprefix(f"{shard}.json: "))]
        return manifest, list(_shard_problems(out, shard, manifest, forgotten, embeddings))

    cores = len(os.sched_getaffinity(0))
    with Screen(shown_on or Console(quiet=True), "verify", "{done:,} of {total} shards", len(shards)) as screen:
        for number, (manifest, damage) in enumerate(of_each(out, checked, shards, cores), 1):
            manifests += [manifest] if manifest else []
            problems += damage
            # Its end is for whoever called to say.
            screen.advance(1, f"problems: {len(problems):,}" if number < len(shards) else None)
    strays = [name for name in names(shards_folder(out)) if _shard_of(name) not in known]
    message = "belongs to no finished shard: a rerun makes it anew, or remove it"
    problems += [Problem("", name, None, message) for name in strays]
    return [*problems, *_dataset_problems(out, manifests)]


def good_news(out: AnyPath) -> str:
    """What to say where there is no problem: nothing at all is none either."""
    return "all shards verify." if shard_names(out) else "no shard is finished yet; there is nothing to verify."


def foreign_files(out: AnyPath) -> list[str]:
    """What lies in OUT and OUT/shards, and is nothing of ours: it is left alone."""
    temporary = (TEMPORARY, NEW)
    foreign = [name for name in names(out) if name not in _OURS and not name.startswith(temporary)]
    in_shards = [name for name in names(out / "shards") if _shard_of(name) is None and not name.startswith(temporary)]
    return foreign + [f"shards/{name}" for name in in_shards]


def _shard_of(name: str) -> str | None:
    """The shard that a file in OUT/shards is part of; None for other files."""
    stem, _, suffix = name.rpartition(".")
    return stem if suffix in _SUFFIXES and finished_shards([f"{stem}.json"]) else None


def _dataset_problems(out: AnyPath, manifests: list[Manifest]) -> Iterator[Problem]:
    """Where dataset.json, or a file that it names, is not what was written, or it contradicts the manifests."""
    try:
        dataset, text = read_dataset(out), (out / DATASET).read_bytes()
        same = {**{name: dataset[name] for name in IDENTITY}, "models": dataset["plan"]["models"]}
    except CorruptShardError as error:
        yield Problem("", DATASET, None, str(error).removeprefix(f"{DATASET}: "))
        return
    except (OSError, KeyError) as error:
        yield Problem("", DATASET, None, f"cannot be read: {type(error).__name__}: {error}")
        return
    sums = None
    if len(manifests) == len(shard_names(out)):
        with suppress(CorruptShardError, RemoteError):  # of a ledger: a problem of its shard
            sums = summary(manifests, out)
    for message in dataset_problems(dataset, text, sums):
        yield Problem("", DATASET, None, message)
    for manifest in manifests:
        for name in (name for name, value in same.items() if getattr(manifest, name) != value):
            yield Problem(manifest.shard, f"{manifest.shard}.json", None, f"{name} is not that of {DATASET}")
    if (claimed := dataset.get("files", {}).get(UNCONDITIONAL)) is not None:
        damage = list(_file_problems(out / UNCONDITIONAL, claimed, DATASET))
        for message in damage or unconditional_problems(out / UNCONDITIONAL):
            yield Problem("", UNCONDITIONAL, None, message)


def _file_problems(path: AnyPath, claimed: dict[str, Any], source: str) -> Iterator[str]:
    """Where a file's length and hash are not those that the file `source` claims."""
    try:
        actual = fingerprint(path)
    except OSError as error:
        yield f"cannot be read: {error.strerror or error}"
        return
    if actual["bytes"] != claimed.get("bytes"):
        yield f"it has {actual['bytes']} bytes; {source} says {claimed.get('bytes')}"
    if actual["sha256"] != claimed.get("sha256"):
        yield f"its sha256 is not the one in {source}"


def _shard_problems(
    out: AnyPath, shard: str, manifest: Manifest, forgotten: Forgotten | None, embeddings: bool | None
) -> Iterator[Problem]:
    """What is wrong with a shard: its manifest, the bytes of its files, and then what they hold."""
    folder = out / "shards"

    def of(suffix: str, messages: Iterable[str]) -> Iterator[Problem]:
        return (Problem(shard, f"{shard}.{suffix}", None, message) for message in messages)

    yield from of("json", manifest_problems(shard, manifest, (folder / f"{shard}.json").read_bytes()))
    damaged = set()
    for suffix in ("parquet", "tar"):
        file = f"{shard}.{suffix}"
        for problem in of(suffix, _file_problems(folder / file, manifest.files.get(file, {}), f"{shard}.json")):
            damaged.add(suffix)
            yield problem
    if "parquet" in damaged:
        return
    try:
        ledger = complete(parquet(folder / f"{shard}.parquet").read())
        ledger.validate(full=True)
    except UNREADABLE as error:
        yield from of("parquet", [f"not a ledger: {error}"])
        return
    if not ledger.schema.equals(LEDGER_SCHEMA):
        yield from of("parquet", ["its columns or types are not those of a ledger"])
        return
    yield from of("parquet", ledger_problems(manifest, ledger))
    if forgotten:
        left = ledger.filter(pa.array(forgotten.rows_in(ledger)))
        message = "it was to be forgotten: give `forget` DIR alone, and it goes on"
        yield from (Problem(shard, f"{shard}.parquet", key, message) for key in left["key"].to_pylist())
    if "tar" not in damaged:
        name = f"{shard}.tar"
        for key, message in tar_problems(folder / name, ledger, embeddings=embeddings):
            yield Problem(shard, name, key, message)
