"""The ledgers of a dataset: the funnel, and what manifests count. A CorruptShardError names what is damaged."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.shared.atomic import TEMPORARY
from pipeline.shared.files import AnyPath, RemotePath, names, parquet
from pipeline.shared.several import of_each
from pipeline.shared.terminal import Screen
from schemas.arrays import Integers, Mask
from schemas.columns import KEPT, complete
from schemas.drops import DropReason
from schemas.errors import ContractError, CorruptShardError, OutputError, RemoteError, first_line
from schemas.names import finished_shards, shard_origin
from schemas.shard import DATASET, Manifest, dataset_digest
from stages import STAGES

LIVE = f"{TEMPORARY}progress.json"
"""Beside the shards' folder while a run goes on, and after one that was killed: what it came to so far."""
_TOGETHER = 10_000
"""Rows, at most those of one ledger more."""
UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError)
"""What pyarrow raises for a file that is no such parquet."""


@dataclass(frozen=True)
class FunnelRow:
    stage: str
    rows_in: int
    dropped: dict[str, int]
    """Reason -> count, the most frequent first; only reasons that occur."""
    works: bool = True
    """Whether it is part of the plan: some stages are off unless they are wanted."""

    @property
    def rows_left(self) -> int:
        return self.rows_in - sum(self.dropped.values())


@dataclass(frozen=True)
class Funnel:
    manifests: tuple[Manifest, ...]
    """Of the shards that are counted, in the order of their names."""
    rows_in: int
    rows: tuple[FunnelRow, ...]
    """One per stage, in the pipeline's order."""

    @property
    def shards(self) -> int:
        return len(self.manifests)

    @property
    def kept(self) -> int:
        return self.rows[-1].rows_left

    @property
    def dropped(self) -> Counter[str]:
        """Reason -> rows, whichever stages gave it."""
        return sum((Counter(row.dropped) for row in self.rows), Counter())

    def share(self, count: int) -> float:
        """A number of rows as a share of all rows in, 0 when there are none."""
        return count / self.rows_in if self.rows_in else 0.0


def shards_folder(out: AnyPath) -> AnyPath:
    """Where the shards of OUT lie; an OutputError where it is no dataset."""
    folder = out / "shards"
    try:
        there = (out / DATASET).is_file() if isinstance(out, RemotePath) else folder.is_dir()
    except OSError as error:
        raise OutputError(f"{out} cannot be read: {error.strerror or error}.") from error
    if not there:
        raise OutputError(f"{out} holds no dataset: there is no folder {folder}; give the OUT of a `dataset` run.")
    return folder


def shard_names(out: AnyPath) -> list[str]:
    """The finished shards of OUT (those with a manifest), sorted."""
    return finished_shards(names(shards_folder(out)))


def read_manifest(out: AnyPath, shard: str) -> Manifest:
    path = out / "shards" / f"{shard}.json"
    try:
        manifest = Manifest.from_json(path.read_bytes())
        if manifest.shard != shard:
            raise CorruptShardError(f"it is the manifest of {manifest.shard}")
        return manifest
    except RemoteError:  # nothing is known of the file: it is not damaged
        raise
    except (CorruptShardError, OSError) as error:
        raise CorruptShardError(f"{path.name}: {error}") from error


def read_manifests(out: AnyPath) -> list[Manifest]:
    """The manifests of all finished shards, in the order of their names."""
    return list(of_each(out, partial(read_manifest, out), shard_names(out)))


class _Model(BaseModel):
    task: str
    name: str
    sha256: str


class _Pack(BaseModel):
    layout: Literal["native", "plain"] = "native"
    embeddings: bool = True


class _Group(BaseModel):
    of: list[str]
    similarity: float


class _Settings(BaseModel, extra="allow"):
    __pydantic_extra__: dict[str, dict[str, Any]]
    pack: _Pack = _Pack()
    group: _Group | None = None


class _Plan(BaseModel):
    stages: list[str] = []
    settings: _Settings = _Settings()
    models: list[_Model] = []


class _Described(BaseModel):
    """What is read of dataset.json; each may be lacking."""

    profile: str = ""
    plan_digest: str = ""
    plan: _Plan = _Plan()
    sources: list[str] = []
    sources_before: list[str] = []
    planned: dict[str, int | None] = {}
    files: dict[str, dict[str, Any]] = {}
    dataset_digest: str = ""


def read_dataset(out: AnyPath) -> dict[str, Any]:
    try:
        dataset = dict(json.loads((out / DATASET).read_bytes()))
        json.dumps(dataset, ensure_ascii=False).encode()  # JSON may hold halves of surrogates, which are no text
        _Described.model_validate(dataset, strict=True)
        return dataset
    except RemoteError:
        raise
    except ValidationError as error:  # edited by hand
        name = error.errors()[0]["loc"][0]
        what = "an object of objects" if name == "files" else "what a run writes"
        raise CorruptShardError(f"{DATASET}: {name} is not {what}") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CorruptShardError(f"{DATASET}: cannot be read: {first_line(error)}") from error


def summary(manifests: Sequence[Manifest], out: AnyPath | None = None) -> dict[str, Any]:
    """What manifests add up to, as dataset.json says it, less the verdicts that later rounds in `out` replaced."""
    gone, dropped = Counter[str](), Counter[str]()
    if out is not None:
        shards = shard_names(out)
        rounds = Rounds(out, shards)
        for shard in shards:
            if rounds.last(shard_origin(shard)[0]):
                ledger = read_ledger(out, shard, ("row", "verdict"))
                gone.update(ledger.filter(pa.array(rounds.replaced(shard, ledger["row"])))["verdict"].to_pylist())
    for manifest in manifests:
        dropped.update(manifest.dropped)
    dropped.subtract({verdict: count for verdict, count in gone.items() if verdict != KEPT})
    return {
        "shards": [manifest.shard for manifest in manifests],
        "rows_in": sum(manifest.rows_in for manifest in manifests) - gone.total(),
        "kept": sum(manifest.kept for manifest in manifests) - gone[KEPT],
        "dropped": dict(dropped),
        "dataset_digest": dataset_digest(manifests),
    }


def counts(verdicts: pa.ChunkedArray, reasons: Sequence[str]) -> tuple[int, dict[str, int]]:
    """How many verdicts are `kept`, and how many are each of `reasons`, zeros too."""
    dropped = occurrences(verdicts)
    kept = dropped.pop(KEPT, 0)
    undeclared = set(dropped) - set(reasons)
    if undeclared:
        raise ContractError(f"no stage declares the verdicts {sorted(map(str, undeclared))}")
    return kept, {str(reason): dropped[reason] for reason in reasons}


def occurrences(column: pa.ChunkedArray) -> Counter[Any]:
    """Value -> rows that have it."""
    return Counter({entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()})


def read_ledger(out: AnyPath, shard: str, columns: Sequence[str], verdict: str | None = None) -> pa.Table:
    """Some columns of one ledger; of rows with this verdict alone, when one is given."""
    path = out / "shards" / f"{shard}.parquet"
    try:
        columns = list(dict.fromkeys(columns))
        # Threads cost more than they save where a ledger has some thousand rows, as most have.
        table = complete(parquet(path).read(columns=list({*columns, "verdict"}), use_threads=False), columns)
        table.validate(full=True)  # bytes that are no text would stop whoever reads them
        return (table if verdict is None else table.filter(pc.equal(table["verdict"], verdict))).select(columns)
    except RemoteError:
        raise
    except UNREADABLE as error:
        raise CorruptShardError(f"{path.name}: not a ledger: {error}") from error


class Rounds:
    """Which rows of a dataset stand in the ledgers of later rounds (second chances) again, part by part."""

    def __init__(self, out: AnyPath, shards: Iterable[str]) -> None:
        """Read the row numbers in the ledgers of all later rounds: eight bytes per row that had a second chance."""
        numbers: dict[str, dict[int, list[Integers]]] = defaultdict(lambda: defaultdict(list))
        for shard in shards:
            part, round = shard_origin(shard)
            if round:
                numbers[part][round].append(read_ledger(out, shard, ("row",))["row"].to_numpy())
        self._rows = {
            part: {round: np.sort(np.concatenate(arrays)) for round, arrays in rounds.items()}
            for part, rounds in numbers.items()
        }

    def last(self, part: str) -> int:
        """The last round of a part, 0 where there was none."""
        return max(self._rows.get(part, {}), default=0)

    def replaced(self, shard: str, rows: pa.ChunkedArray, before: int | None = None) -> Mask:
        """Which of a shard's rows a later round holds; a round before `before`, when given."""
        part, own = shard_origin(shard)
        wanted = rows.to_numpy()
        mask = np.zeros(len(wanted), bool)
        for round, numbers in self._rows.get(part, {}).items():
            if round > own and (before is None or round < before) and len(numbers):
                # A search in sorted numbers: np.isin would sort them anew for each of thousands of shards.
                mask |= numbers[np.searchsorted(numbers, wanted).clip(max=len(numbers) - 1)] == wanted
        return mask


def funnel(
    out: AnyPath,
    columns: Sequence[str] = (),
    add: Callable[[pa.Table], None] = lambda ledger: None,
    shown_on: Console | None = None,
) -> Funnel:
    """The funnel of all finished shards, counted from their ledgers, of which few are in memory at a time.

    Rows that had a second chance are counted once, with their last verdict. `add` gets all rows that are counted, in
    these columns, with stage and verdict; `shown_on` is told how far it is.
    """
    total: Counter[tuple[str, str]] = Counter()
    shards, manifests = shard_names(out), list[Manifest]()
    rounds = Rounds(out, shards)

    def read(shard: str) -> tuple[pa.Table, Manifest]:
        return read_ledger(out, shard, [*columns, "row", "stage", "verdict"]), read_manifest(out, shard)

    def checked() -> Iterator[pa.Table]:
        for shard, (ledger, manifest) in zip(shards, of_each(out, read, shards), strict=True):
            manifests.append(manifest)
            if unknown := {*pc.unique(ledger["stage"]).to_pylist()} - {*STAGES}:
                raise CorruptShardError(f"{shard}.parquet: the stage {min(map(str, unknown))!r} is not known")
            by_verdict = occurrences(ledger["verdict"])
            claimed = Counter({KEPT: manifest.kept, **manifest.dropped})
            if by_verdict != claimed or by_verdict.total() != manifest.rows_in:
                counts = {**by_verdict, **claimed}
                differing = sorted(str(v) for v in counts if by_verdict[v] != claimed[v]) or ["rows_in"]
                raise CorruptShardError(f"{shard}: ledger and manifest count {', '.join(differing)} differently")
            if rounds.last(shard_origin(shard)[0]):
                ledger = ledger.filter(pa.array(~rounds.replaced(shard, ledger["row"])))
            screen.advance(1, f"{ledger.num_rows:,} rows in the last")
            yield ledger

    with Screen(shown_on or Console(quiet=True), "count", "{done:,} of {total} ledgers", len(shards)) as screen:
        for ledger in gathered(checked()):
            total.update(by_stage_and_verdict(ledger))
            add(ledger)
    dataset = read_dataset(out) if (out / DATASET).exists() else {}  # it may not have been copied along
    at_work = dataset.get("plan", {}).get("stages") or STAGES
    left = rows_in = total.total()
    rows = []
    for stage in STAGES:
        dropped = [(verdict, n) for (at, verdict), n in total.items() if at == stage and verdict != KEPT and n]
        reasons = dict(sorted(dropped, key=lambda entry: (-entry[1], entry[0])))
        rows.append(FunnelRow(stage, left, reasons, bool(reasons) or stage in at_work))
        left = rows[-1].rows_left
    return Funnel(tuple(manifests), rows_in, tuple(rows))


def gathered(ledgers: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Small ones together: what is computed of a table costs as much as a thousand rows, however few it has."""
    some, rows = list[pa.Table](), 0
    for ledger in ledgers:
        some.append(ledger)
        rows += ledger.num_rows
        if rows >= _TOGETHER:
            yield pa.concat_tables(some, promote_options="permissive").combine_chunks()
            some, rows = [], 0
    if some:
        yield pa.concat_tables(some, promote_options="permissive").combine_chunks()


def by_stage_and_verdict(ledger: pa.Table) -> Counter[tuple[str, str]]:
    """(stage, verdict) -> rows."""
    groups = ledger.group_by(["stage", "verdict"]).aggregate([([], "count_all")]).to_pylist()
    return Counter({(group["stage"], group["verdict"]): group["count_all"] for group in groups})


def why_nothing(rows: str, dropped: Mapping[str, int]) -> str:
    """One sentence on why none of some rows was kept, with the most frequent reasons, which name their thresholds."""
    sentences = {str(reason): reason.sentence for reason in DropReason}
    often = sorted(((count, reason) for reason, count in dropped.items() if count), reverse=True)[:3]
    why = [f"{count:,} dropped as {reason} ({sentences.get(reason, 'unknown')})" for count, reason in often]
    return f"NOTHING IS KEPT of {rows}{':' * bool(why)} {'; '.join(why)}".strip() + "."


def funnel_table(funnel: Funnel) -> Table:
    """The funnel for a terminal or a log: a line per stage, and one per reason below it."""
    title = f"Funnel of {funnel.shards:,} shard{'' if funnel.shards == 1 else 's'}"
    table = Table("stage", "rows in", "%", title=title, title_justify="left", box=box.ASCII)
    table.columns[1].justify = table.columns[2].justify = "right"
    lines: list[tuple[str, int, str | None]] = []
    for row in (one for one in funnel.rows if one.works):
        lines.append((row.stage, row.rows_in, None))
        lines += [(f"  - {reason}", count, "dim") for reason, count in row.dropped.items()]
    for label, count, style in [*lines, ("kept", funnel.kept, "bold")]:
        table.add_row(label, f"{count:,}", f"{100 * funnel.share(count):.1f}", style=style)
    return table
