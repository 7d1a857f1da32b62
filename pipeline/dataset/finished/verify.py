"""`verify`: whether every file of a dataset is what its manifest says, and every sample what the contract says."""

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.finished.contract import sample_problems, unconditional_problems
from pipeline.dataset.out.forgotten import FORGOTTEN, NEW, Forgotten, is_interrupted, load
from pipeline.dataset.out.ledger import UNREADABLE, counts, read_manifest, replaced, shard_names, shards_folder, summary
from pipeline.dataset.out.output import fingerprint
from pipeline.dataset.out.takedowns import DROPS, KEEPS, STAGE
from pipeline.shared.atomic import TEMPORARY
from pipeline.shared.files import AnyPath, parquet
from pipeline.shared.tars import salvage, unpack
from schemas.columns import KEPT, LEDGER_SCHEMA
from schemas.digest import sha256_of_json
from schemas.drops import DropReason
from schemas.errors import ContractError, CorruptShardError
from schemas.names import sample_key, shard_origin
from schemas.shard import DATASET, UNCONDITIONAL, Manifest, sample_sha256
from stages import STAGES

_MEASURED = ("sha256", "n_bytes", "format", "width", "height", "bbox", "kps", "det_score", "face_px", "sample_sha256")
"""Ledger columns that no kept row may lack."""
_IDENTITY = ("schema_version", "profile", "plan_digest")
"""What dataset.json and every manifest repeat of the plan."""


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
    """Check all finished shards of OUT; `on_shard` hears each one's name when it was checked.

    Whatever is wrong with files below OUT is a problem in the list, never an exception.

    Raises:
        OutputError: when OUT is no dataset.
    """
    problems: list[Problem] = []
    manifests: list[Manifest] = []
    told = _Told(forgotten=_forgotten(out, problems), embeddings=_embeddings(out))
    for shard in shard_names(out):
        try:
            manifest = read_manifest(out, shard)
        except CorruptShardError as error:
            problems.append(Problem(shard, f"{shard}.json", None, _reason(error, f"{shard}.json")))
        else:
            manifests.append(manifest)
            problems += _shard_problems(out, shard, manifest, told)
        if on_shard:
            on_shard(shard)
    problems += _strays(out)
    problems += _dataset_problems(out, manifests)
    return problems


def _reason(error: Exception, file: str) -> str:
    return str(error).removeprefix(f"{file}: ")


@dataclass(frozen=True)
class _Told:
    """What files beside the shards say of their content."""

    forgotten: Forgotten | None
    """None when nobody knows."""
    embeddings: bool | None
    """Whether samples have them; None when nobody knows."""


def _forgotten(out: AnyPath, problems: list[Problem]) -> Forgotten | None:
    if is_interrupted(out):
        problems.append(Problem("", "shards", None, "`forget` was killed: give it DIR alone, and it goes on"))
    try:
        return load(out)
    except (CorruptShardError, OSError) as error:
        problems.append(Problem("", FORGOTTEN, None, _reason(error, FORGOTTEN)))
        return None


def _embeddings(out: AnyPath) -> bool | None:
    try:
        wanted = json.loads((out / DATASET).read_bytes())["plan"]["settings"].get("pack", {}).get("embeddings", True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return wanted if isinstance(wanted, bool) else None


def _strays(out: AnyPath) -> Iterator[Problem]:
    """Files that belong to no finished shard; temporary ones are a running or killed run's."""
    shards = set(shard_names(out))
    folder: AnyPath = shards_folder(out)
    found: list[AnyPath] = [*folder.iterdir()]
    for path in sorted(found, key=lambda path: path.name):
        if path.name.startswith((TEMPORARY, NEW)):
            continue
        if path.suffix not in (".tar", ".parquet", ".json") or path.stem not in shards:
            yield Problem("", path.name, None, "belongs to no finished shard: a rerun makes it anew, or remove it")


def _dataset_problems(out: AnyPath, manifests: list[Manifest]) -> Iterator[Problem]:
    """Where dataset.json is not what was written, or contradicts the manifests."""
    try:
        text = (out / DATASET).read_bytes()
        dataset = json.loads(text)
        identity = {name: dataset[name] for name in _IDENTITY}
        models = dataset["plan"]["models"]
        written = json.dumps(dataset, indent=2, sort_keys=True) + "\n"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        yield Problem("", DATASET, None, f"cannot be read: {type(error).__name__}: {error}")
        return
    for message in (*_identity_problems(dataset), *_summary_problems(out, dataset, manifests)):
        yield Problem("", DATASET, None, message)
    if written.encode() != text:
        yield Problem("", DATASET, None, "the text is not that of a dataset.json as it was written")
    for manifest in manifests:
        for name, value in {**identity, "models": models}.items():
            if getattr(manifest, name) != value:
                yield Problem(manifest.shard, f"{manifest.shard}.json", None, f"{name} is not that of {DATASET}")
    yield from _named_problems(out, dataset.get("files", {}))


def _identity_problems(dataset: Mapping[str, Any]) -> Iterator[str]:
    """Where the plan that it tells is not the one of its digest."""
    plan = dataset["plan"]
    if sha256_of_json(plan) != dataset["plan_digest"]:
        yield "its plan is not the one of its plan_digest"
    for name in ("schema_version", "profile"):
        if plan.get(name) != dataset[name]:
            yield f"{name} is not that of its plan"


def _summary_problems(out: AnyPath, dataset: Mapping[str, Any], manifests: list[Manifest]) -> Iterator[str]:
    """Where it does not tell what the manifests add up to, once the run came to its end."""
    try:
        told = summary(manifests, replaced(out))
    except CorruptShardError:  # told already; what it would have replaced, nobody knows
        return
    more = set(dataset) - {*_IDENTITY, "plan"}
    if missing := sorted(set(told) - more) if more else []:
        yield f"it lacks {', '.join(missing)}"
    if unknown := sorted(more - {*told, "files"}):
        yield f"it has the unknown entries {', '.join(unknown)}"
    if "shards" in dataset and len(manifests) == len(shard_names(out)):
        differing = [name for name, value in told.items() if dataset.get(name) != value]
        if differing:
            yield f"the manifests add up to other {', '.join(differing)}"


def _named_problems(out: AnyPath, files: Any) -> Iterator[Problem]:
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


def _shard_problems(out: AnyPath, shard: str, manifest: Manifest, told: _Told) -> Iterator[Problem]:
    name = f"{shard}.json"
    for message in _manifest_problems(out, shard, manifest):
        yield Problem(shard, name, None, message)
    damage = {}
    for suffix in ("parquet", "tar"):
        file = f"{shard}.{suffix}"
        damage[suffix] = list(_file_problems(out / "shards" / file, manifest.files.get(file, {}), name))
        for message in damage[suffix]:
            yield Problem(shard, file, None, message)
    if damage["parquet"]:  # damaged bytes were already found: what is inside them proves nothing more
        return
    ledger = yield from _ledger(out, shard)
    if ledger is None:
        return
    kept = ledger.filter(pc.equal(ledger["verdict"], KEPT))
    for message in (*_ledger_problems(manifest, ledger, kept), *_key_problems(shard, ledger)):
        yield Problem(shard, f"{shard}.parquet", None, message)
    yield from _forgotten_problems(shard, ledger, told.forgotten)
    path = out / "shards" / f"{shard}.tar"
    yield from _damaged_samples(path, kept) if damage["tar"] else _tar_problems(path, kept, told.embeddings)


def _manifest_problems(out: AnyPath, shard: str, manifest: Manifest) -> Iterator[str]:
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


def _file_problems(path: AnyPath, claimed: dict[str, Any], told_by: str) -> Iterator[str]:
    """Where a file's length and hash are not those that the file `told_by` claims."""
    try:
        found = fingerprint(path)
    except OSError as error:
        yield f"cannot be read: {error.strerror or error}"
        return
    if found["bytes"] != claimed.get("bytes"):
        yield f"it has {found['bytes']} bytes; {told_by} says {claimed.get('bytes')}"
    if found["sha256"] != claimed.get("sha256"):
        yield f"its sha256 is not the one in {told_by}"


def _ledger(out: AnyPath, shard: str) -> Generator[Problem, None, pa.Table | None]:
    """The ledger of a shard whose bytes are those that were published."""
    name = f"{shard}.parquet"
    try:
        ledger = parquet(out / "shards" / name).read()
        ledger.validate(full=True)
    except UNREADABLE as error:
        yield Problem(shard, name, None, f"not a ledger: {error}")
        return None
    if not ledger.schema.equals(LEDGER_SCHEMA):
        yield Problem(shard, name, None, "its columns or types are not those of a ledger")
        return None
    return ledger


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
    (part, _), last = shard_origin(shard), -1
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


def _forgotten_problems(shard: str, ledger: pa.Table, forgotten: Forgotten | None) -> Iterator[Problem]:
    """Forgotten rows of which something is known, and rows that were to be forgotten."""
    name = f"{shard}.parquet"
    verdicts = pa.array([str(reason) for reason in DROPS])
    gone = ledger.filter(pc.and_(pc.is_in(ledger["verdict"], verdicts), pc.equal(ledger["stage"], STAGE)))
    known = [column for column in ledger.column_names if column not in KEEPS and gone[column].null_count < len(gone)]
    if known:
        yield Problem(shard, name, None, f"rows that must not be used still tell {', '.join(known)}")
    if forgotten:
        left = ledger.filter(pa.array(forgotten.urls_in(ledger) | forgotten.contents_in(ledger)))
        for key in left["key"].to_pylist():
            yield Problem(shard, name, key, "it was to be forgotten: give `forget` DIR alone, and it goes on")


def _tar_problems(path: AnyPath, kept: pa.Table, embeddings: bool | None) -> Iterator[Problem]:
    """What is wrong with the samples of a tar, given the kept rows of its ledger."""
    shard, wanted = path.stem, kept["key"].to_pylist()
    rows = {key: index for index, key in enumerate(wanted)}
    found: list[str] = []
    try:
        for sample in unpack(path):
            found.append(sample.key)
            record = _record(kept, rows.get(sample.key))
            for message in sample_problems(sample, record, embeddings=embeddings):
                yield Problem(shard, path.name, sample.key, message)
    except CorruptShardError as error:
        yield Problem(shard, path.name, None, _reason(error, str(path)))
    yield from _missing(path, sorted(set(wanted) - set(found)))
    if sorted(found) != found or len(set(found)) != len(found):
        yield Problem(shard, path.name, None, "its keys are not sorted, or a key occurs twice")


def _missing(path: AnyPath, keys: Iterable[str]) -> Iterator[Problem]:
    for key in keys:
        yield Problem(path.stem, path.name, key, "the ledger keeps it, but the tar has no such sample")


def _damaged_samples(path: AnyPath, kept: pa.Table) -> Iterator[Problem]:
    """Which samples of a tar of other bytes are not what the ledger's sample_sha256 stand for."""
    wanted = dict(zip(kept["key"].to_pylist(), kept["sample_sha256"].to_pylist(), strict=True))
    seen: set[str] = set()
    blamed = False
    try:
        for remains in salvage(path):
            seen.add(remains.key)
            whole = remains.clean and sample_sha256(remains.files) == wanted.get(remains.key)
            if not whole:
                blamed = True
                yield Problem(path.stem, path.name, remains.key, "its bytes are not those that were written")
    except OSError:
        return  # that it cannot be read was said before
    missing = sorted(set(wanted) - seen)
    yield from _missing(path, missing)
    if not (blamed or missing):
        yield Problem(path.stem, path.name, None, "the damage lies outside of all samples")


def _record(kept: pa.Table, index: int | None) -> dict[str, Any] | None:
    if index is None:
        return None
    record: dict[str, Any] = kept.slice(index, 1).to_pylist()[0]
    return record
