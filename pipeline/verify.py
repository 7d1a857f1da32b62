"""`verify`: whether every file of a dataset is what its manifest says, and every sample what the contract says."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.contract import sample_problems, unconditional_problems
from pipeline.ledger import UNREADABLE, counts, read_manifest, shard_names, shards_folder, summary
from pipeline.unpack import unpack
from schemas.columns import KEPT, LEDGER_SCHEMA
from schemas.drops import DropReason
from schemas.errors import ContractError, CorruptShardError
from schemas.names import sample_key
from schemas.shard import DATASET, UNCONDITIONAL, Manifest
from stages import STAGES

_MEASURED = ("sha256", "n_bytes", "format", "width", "height", "bbox", "kps", "det_score", "face_px")
"""Ledger columns that no kept row may lack."""


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


def verify(out: Path, on_shard: Callable[[str], None] | None = None) -> list[Problem]:
    """Check all finished shards of OUT; `on_shard` hears each one's name when it was checked.

    Whatever is wrong with files below OUT is a problem in the list, never an exception.

    Raises:
        OutputError: when OUT is no dataset.
    """
    problems: list[Problem] = []
    manifests: list[Manifest] = []
    for shard in shard_names(out):
        try:
            manifest = read_manifest(out, shard)
        except CorruptShardError as error:
            problems.append(Problem(shard, f"{shard}.json", None, _reason(error, f"{shard}.json")))
        else:
            manifests.append(manifest)
            problems += _shard_problems(out, shard, manifest)
        if on_shard:
            on_shard(shard)
    problems += _strays(out)
    problems += _dataset_problems(out, manifests)
    return problems


def _reason(error: Exception, file: str) -> str:
    return str(error).removeprefix(f"{file}: ")


def _strays(out: Path) -> Iterator[Problem]:
    """Files that belong to no finished shard; temporary ones are a running or killed run's."""
    shards = set(shard_names(out))
    for path in sorted(shards_folder(out).iterdir()):
        if path.name.startswith(".tmp-"):
            continue
        if path.suffix not in (".tar", ".parquet", ".json") or path.stem not in shards:
            yield Problem("", path.name, None, "belongs to no finished shard: a rerun makes it anew, or remove it")


def _dataset_problems(out: Path, manifests: list[Manifest]) -> Iterator[Problem]:
    """Where dataset.json and the manifests contradict each other."""
    try:
        dataset = json.loads((out / DATASET).read_bytes())
        identity = {name: dataset[name] for name in ("schema_version", "profile", "plan_digest")}
        models = dataset["plan"]["models"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        yield Problem("", DATASET, None, f"cannot be read: {type(error).__name__}: {error}")
        return
    for manifest in manifests:
        for name, value in {**identity, "models": models}.items():
            if getattr(manifest, name) != value:
                yield Problem(manifest.shard, f"{manifest.shard}.json", None, f"{name} is not that of {DATASET}")
    if "shards" in dataset and len(manifests) == len(shard_names(out)):
        differing = [name for name, value in summary(manifests).items() if dataset.get(name) != value]
        if differing:
            yield Problem("", DATASET, None, f"the manifests add up to other {', '.join(differing)}")
    yield from _named_problems(out, dataset.get("files", {}))


def _named_problems(out: Path, files: Any) -> Iterator[Problem]:
    """What is wrong with the files that dataset.json names."""
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        yield Problem("", DATASET, None, "files is not an object of objects")
        return
    for name, claimed in files.items():
        if name != UNCONDITIONAL:
            yield Problem("", DATASET, None, f"it names the file {name!r}, which no dataset has")
            continue
        messages = list(_file_problems(out / name, claimed, DATASET))
        for message in messages or unconditional_problems(out / name):
            yield Problem("", name, None, message)


def _shard_problems(out: Path, shard: str, manifest: Manifest) -> Iterator[Problem]:
    name = f"{shard}.json"
    for message in _manifest_problems(out, shard, manifest):
        yield Problem(shard, name, None, message)
    whole = True
    for suffix in ("parquet", "tar"):
        file = f"{shard}.{suffix}"
        for message in _file_problems(out / "shards" / file, manifest.files.get(file, {}), name):
            whole = False
            yield Problem(shard, file, None, message)
    if whole:  # damaged bytes were already found: what is inside them proves nothing more
        yield from _content_problems(out, shard, manifest)


def _manifest_problems(out: Path, shard: str, manifest: Manifest) -> Iterator[str]:
    if manifest.to_json().encode() != (out / "shards" / f"{shard}.json").read_bytes():
        yield "the text is not that of a manifest as it was written"
    if manifest.shard != shard:
        yield f"it is the manifest of {manifest.shard}"
    unknown = set(manifest.dropped) - set(DropReason)
    if unknown:
        yield f"it counts the unknown reasons {sorted(unknown)}"
    if not manifest.conserves_rows():
        yield f"{manifest.rows_in} rows in, but {manifest.kept} kept + {sum(manifest.dropped.values())} dropped"
    if set(manifest.files) != {f"{shard}.tar", f"{shard}.parquet"}:
        yield f"it names the files {sorted(manifest.files)}"


def _file_problems(path: Path, claimed: dict[str, Any], told_by: str) -> Iterator[str]:
    """Where a file's length and hash are not those that the file `told_by` claims."""
    try:
        with path.open("rb") as stream:
            size, sha256 = path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        yield f"cannot be read: {error.strerror}"
        return
    if size != claimed.get("bytes"):
        yield f"it has {size} bytes; {told_by} says {claimed.get('bytes')}"
    if sha256 != claimed.get("sha256"):
        yield f"its sha256 is not the one in {told_by}"


def _content_problems(out: Path, shard: str, manifest: Manifest) -> Iterator[Problem]:
    """What is wrong inside a ledger and a tar whose bytes are those that were published."""
    name = f"{shard}.parquet"
    try:
        ledger = pq.ParquetFile(out / "shards" / name).read()
        ledger.validate(full=True)
    except UNREADABLE as error:
        yield Problem(shard, name, None, f"not a ledger: {error}")
        return
    if not ledger.schema.equals(LEDGER_SCHEMA):
        yield Problem(shard, name, None, "its columns or types are not those of a ledger")
        return
    kept = ledger.filter(pc.equal(ledger["verdict"], KEPT))
    for message in (*_ledger_problems(manifest, ledger, kept), *_key_problems(shard, ledger)):
        yield Problem(shard, name, None, message)
    yield from _tar_problems(out / "shards" / f"{shard}.tar", kept)


def _ledger_problems(manifest: Manifest, ledger: pa.Table, kept: pa.Table) -> Iterator[str]:
    if ledger.num_rows != manifest.rows_in:
        yield f"it has {ledger.num_rows} rows; the manifest says {manifest.rows_in}"
    try:
        if counts(ledger["verdict"], list(manifest.dropped)) != (manifest.kept, manifest.dropped):
            yield "it counts the verdicts differently from the manifest"
    except ContractError as error:
        yield str(error)
    unknown = set(pc.unique(ledger["stage"]).to_pylist()) - set(STAGES)
    if unknown:
        yield f"unknown stages {sorted(map(str, unknown))}"
    if set(pc.unique(kept["stage"]).to_pylist()) - {list(STAGES)[-1]}:
        yield "it keeps rows that did not pass the last stage"
    for column in _MEASURED:
        if kept[column].null_count:
            yield f"{kept[column].null_count} kept rows have no {column}"


def _key_problems(shard: str, ledger: pa.Table) -> Iterator[str]:
    """Where the rows are not this shard's, each once, in order; the first such row."""
    part, last = shard.rpartition("-")[0], -1
    for batch in ledger.select(["key", "part", "row"]).to_batches(max_chunksize=4096):
        for record in batch.to_pylist():
            row = record["row"]
            if record["part"] != part or row is None or record["key"] != sample_key(part, row):
                yield f"the key {record['key']!r} is not that of a row of {part}"
                return
            if row <= last:
                yield f"the key {record['key']!r} is out of order or occurs twice"
                return
            last = row


def _tar_problems(path: Path, kept: pa.Table) -> Iterator[Problem]:
    """What is wrong with the samples of a tar, given the kept rows of its ledger."""
    shard, wanted = path.stem, kept["key"].to_pylist()
    rows = {key: index for index, key in enumerate(wanted)}
    found: list[str] = []
    try:
        for sample in unpack(path):
            found.append(sample.key)
            record = _record(kept, rows.get(sample.key))
            for message in sample_problems(sample, record):
                yield Problem(shard, path.name, sample.key, message)
    except CorruptShardError as error:
        yield Problem(shard, path.name, None, _reason(error, path.name))
    for key in sorted(set(wanted) - set(found)):
        yield Problem(shard, path.name, key, "the ledger keeps it, but the tar has no such sample")
    if sorted(found) != found or len(set(found)) != len(found):
        yield Problem(shard, path.name, None, "its keys are not sorted, or a key occurs twice")


def _record(kept: pa.Table, index: int | None) -> dict[str, Any] | None:
    if index is None:
        return None
    record: dict[str, Any] = kept.slice(index, 1).to_pylist()[0]
    return record
