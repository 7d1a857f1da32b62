"""`verify`: whether every file of a dataset is what its manifest says, and every sample what the contract says."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.finished.contract import (
    ledger_problems,
    manifest_problems,
    sample_problems,
    unconditional_problems,
)
from pipeline.dataset.finished.report import REPORT
from pipeline.dataset.out.forgotten import FORGOTTEN, NEW, Forgotten, is_interrupted, load
from pipeline.dataset.out.ledger import UNREADABLE, read_manifest, replaced, shard_names, shards_folder, summary
from pipeline.dataset.out.output import fingerprint
from pipeline.shared.atomic import TEMPORARY
from pipeline.shared.files import AnyPath, names, parquet
from pipeline.shared.tars import unpack
from schemas.columns import KEPT, LEDGER_SCHEMA
from schemas.digest import sha256_of_json
from schemas.errors import CorruptShardError
from schemas.names import finished_shards
from schemas.shard import DATASET, UNCONDITIONAL, Manifest

_IDENTITY = ("schema_version", "profile", "plan_digest")
"""What dataset.json and every manifest repeat of the plan."""
_OURS = (DATASET, FORGOTTEN, UNCONDITIONAL, REPORT, "shards", "drops")
_SUFFIXES = ("tar", "parquet", "json")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a dataset."""

    shard: str
    """Empty when it concerns the dataset as a whole."""
    file: str
    """Name below OUT/shards; of the dataset's own files, below OUT."""
    key: str | None
    """The sample, where it concerns one."""
    message: str


def verify(out: AnyPath, on_shard: Callable[[str], None] | None = None) -> list[Problem]:
    """Check all finished shards of OUT; `on_shard` gets each one's name when it was checked.

    Whatever is wrong with files below OUT is a problem in the list, never an exception. Bytes that are not those of the
    manifest are a problem of their file: what is inside them proves nothing more.

    Raises:
        OutputError: when OUT is no dataset.
    """
    problems: list[Problem] = []
    manifests: list[Manifest] = []
    shards = shard_names(out)
    if is_interrupted(out):
        problems.append(Problem("", "shards", None, "`forget` was killed: give it DIR alone, and it goes on"))
    try:
        forgotten = load(out)
    except (CorruptShardError, OSError) as error:
        forgotten = None  # what is to be forgotten, nobody knows
        problems.append(Problem("", FORGOTTEN, None, str(error).removeprefix(f"{FORGOTTEN}: ")))
    try:
        plan = json.loads((out / DATASET).read_bytes())["plan"]
        embeddings = plan["settings"].get("pack", {}).get("embeddings", True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        embeddings = None  # a problem of dataset.json, below
    for shard in shards:
        try:
            manifest = read_manifest(out, shard)
        except CorruptShardError as error:
            problems.append(Problem(shard, f"{shard}.json", None, str(error).removeprefix(f"{shard}.json: ")))
        else:
            manifests.append(manifest)
            problems += _shard_problems(out, shard, manifest, forgotten, embeddings)
        if on_shard:
            on_shard(shard)
    for name in names(shards_folder(out)):
        stem, _, suffix = name.rpartition(".")
        if suffix in _SUFFIXES and finished_shards([f"{stem}.json"]) and stem not in shards:
            problems.append(
                Problem("", name, None, "belongs to no finished shard: a rerun makes it anew, or remove it")
            )
    return [*problems, *_dataset_problems(out, manifests)]


def foreign_files(out: AnyPath) -> list[str]:
    """What lies in OUT and OUT/shards, and is nothing of ours: it is left alone."""
    temporary = (TEMPORARY, NEW)
    foreign = [name for name in names(out) if name not in _OURS and not name.startswith(temporary)]
    for name in names(out / "shards"):
        stem, _, suffix = name.rpartition(".")
        ours = suffix in _SUFFIXES and finished_shards([f"{stem}.json"])
        if not ours and not name.startswith(temporary):
            foreign.append(f"shards/{name}")
    return foreign


def _dataset_problems(out: AnyPath, manifests: list[Manifest]) -> Iterator[Problem]:
    """Where dataset.json is not what was written, or contradicts the manifests."""
    try:
        text = (out / DATASET).read_bytes()
        dataset = json.loads(text)
        plan, identity = dataset["plan"], {name: dataset[name] for name in _IDENTITY}
        same = {**identity, "models": plan["models"]}
        written = json.dumps(dataset, indent=2, sort_keys=True) + "\n"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        yield Problem("", DATASET, None, f"cannot be read: {type(error).__name__}: {error}")
        return
    messages = []
    if sha256_of_json(plan) != dataset["plan_digest"]:
        messages.append("its plan is not the one of its plan_digest")
    messages += [f"{name} is not that of its plan" for name in _IDENTITY[:2] if plan.get(name) != dataset[name]]
    if written.encode() != text:
        messages.append("the text is not that of a dataset.json as it was written")
    try:
        sums = summary(manifests, replaced(out))
    except CorruptShardError:  # a problem of its shard; what its rows would have replaced, nobody knows
        pass
    else:
        more = set(dataset) - {*_IDENTITY, "plan"}  # there when the run came to its end
        if missing := sorted(set(sums) - more) if more else []:
            messages.append(f"it lacks {', '.join(missing)}")
        if unknown := sorted(more - {*sums, "files"}):
            messages.append(f"it has the unknown entries {', '.join(unknown)}")
        differing = [name for name, value in sums.items() if dataset.get(name) != value]
        if "shards" in dataset and len(manifests) == len(shard_names(out)) and differing:
            messages.append(f"the manifests add up to other {', '.join(differing)}")
    files = dataset.get("files", {})
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        messages.append("files is not an object of objects")
        files = {}
    messages += [f"it names the file {name!r}, which no dataset has" for name in files if name != UNCONDITIONAL]
    for message in messages:
        yield Problem("", DATASET, None, message)
    for manifest in manifests:
        for name in (name for name, value in same.items() if getattr(manifest, name) != value):
            yield Problem(manifest.shard, f"{manifest.shard}.json", None, f"{name} is not that of {DATASET}")
    if UNCONDITIONAL in files:
        damage = list(_file_problems(out / UNCONDITIONAL, files[UNCONDITIONAL], DATASET))
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
    folder, name = out / "shards", f"{shard}.json"
    for message in manifest_problems(shard, manifest, (folder / name).read_bytes()):
        yield Problem(shard, name, None, message)
    damaged = set()
    for suffix in ("parquet", "tar"):
        file = f"{shard}.{suffix}"
        for message in _file_problems(folder / file, manifest.files.get(file, {}), name):
            damaged.add(suffix)
            yield Problem(shard, file, None, message)
    if "parquet" in damaged:
        return

    name = f"{shard}.parquet"
    try:
        ledger = parquet(folder / name).read()
        ledger.validate(full=True)
    except UNREADABLE as error:
        yield Problem(shard, name, None, f"not a ledger: {error}")
        return
    if not ledger.schema.equals(LEDGER_SCHEMA):
        yield Problem(shard, name, None, "its columns or types are not those of a ledger")
        return
    for message in ledger_problems(manifest, ledger):
        yield Problem(shard, name, None, message)
    if forgotten:
        left = ledger.filter(pa.array(forgotten.urls_in(ledger) | forgotten.contents_in(ledger)))
        for key in left["key"].to_pylist():
            yield Problem(shard, name, key, "it was to be forgotten: give `forget` DIR alone, and it goes on")

    if "tar" in damaged:
        return
    name = f"{shard}.tar"
    kept = ledger.filter(pc.equal(ledger["verdict"], KEPT))
    index = {key: position for position, key in enumerate(kept["key"].to_pylist())}
    keys = []
    try:
        for sample in unpack(folder / name):
            keys.append(sample.key)
            record = kept.slice(index[sample.key], 1).to_pylist()[0] if sample.key in index else None
            for message in sample_problems(sample, record, embeddings=embeddings):
                yield Problem(shard, name, sample.key, message)
    except CorruptShardError as error:
        yield Problem(shard, name, None, str(error).removeprefix(f"{folder / name}: "))
    for key in sorted(set(index) - set(keys)):
        yield Problem(shard, name, key, "the ledger keeps it, but the tar has no such sample")
    if any(first >= second for first, second in pairwise(keys)):
        yield Problem(shard, name, None, "its keys are not sorted, or a key occurs twice")
