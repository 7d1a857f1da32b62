"""Other thresholds on the ledgers of a dataset: what would become of each row, without an image.

Thresholds of `filter.*` judge what ledgers hold, so a row that was measured gets the verdict that a new run would give
it. A row that a threshold had ended before it was measured is none that was judged: it gets a word of `UNJUDGED`.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError
from rich import box
from rich.table import Table

from pipeline.dataset.out.ledger import Rounds, gathered, occurrences, read_ledger, shard_names, shards_folder
from pipeline.shared.configfile import explain, merge, read_values
from pipeline.shared.files import AnyPath
from pipeline.shared.several import of_each
from schemas.arrays import Doubles, Mask
from schemas.columns import KEPT, LATER
from schemas.drops import DropReason
from schemas.errors import ConfigError, CorruptShardError, OutputError, RemoteError
from schemas.names import shard_origin
from schemas.shard import DATASET
from stages import STAGES
from stages.filter import FROM_POINTS, QUALITIES, Filter, from_points, is_least, spans_a_face
from stages.metadata import Metadata
from stages.screen import SEEN_PX, Screen
from stages.settings import FilterSettings, Settings

UNJUDGED = {
    "passes": "pass the thresholds by which they had been dropped; later stages may still drop some",
    "unseen": "had been dropped for their size: no face was ever looked for in them",
    "unmeasured": "were not measured by what is judged now: by an earlier release, or without a model for it",
    "unsure": "showed nothing at the reduced size, at which faces as small as these cannot be seen",
}
"""What may become of a row that is no verdict, and why; all these rows have to be fetched again."""

OUTCOMES = (KEPT, *map(str, DropReason), *UNJUDGED)

THRESHOLDS = {
    "min_image_px": DropReason.SMALL_IMAGE,
    "max_pixels": DropReason.TOO_MANY_PIXELS,
    "max_second_score": DropReason.SEVERAL_FACES,
    "min_face_px": DropReason.SMALL_FACE,
    **{quality.key: quality.reason for quality in QUALITIES},
}
"""Key of `filter` -> the reason of a row that fails it: of several, the first of these."""

OFF = {quality.key: quality.off for quality in QUALITIES}
"""Key of a quality -> the threshold that lets everything pass."""

COLUMNS = tuple(
    dict.fromkeys(
        (
            *("stage", "meta_width", "meta_height", "width", "height", *Filter.reads),
            *(quality.measure for quality in QUALITIES if quality.measure not in FROM_POINTS),
        )
    )
)
"""Columns of the ledger, beside the verdict, that thresholds depend on."""

Codes = npt.NDArray[np.int16]


def code(outcome: str) -> int:
    """Its number in OUTCOMES."""
    return OUTCOMES.index(outcome)


@dataclass(frozen=True)
class Evidence:
    """What thresholds judge of N rows, and what becomes of those that pass them all."""

    values: Mapping[str, Doubles]
    """Each of THRESHOLDS -> (N,) what it judges; infinite: the row passes, or fails, any.

    Worse than the threshold that lets everything pass: what was not measured.
    """
    outcome: Codes
    """(N,) numbers in OUTCOMES."""

    def judged(self, limits: FilterSettings, factor: int) -> Codes:
        """(N,) numbers in OUTCOMES under these thresholds; `factor` is what the screen had reduced photos by."""
        verdicts = self.outcome.copy()
        for key, reason in reversed(THRESHOLDS.items()):
            values, limit, off = self.values[key], getattr(limits, key), OFF.get(key)
            if limit != off:
                verdicts[values < limit if is_least(key) else values > limit] = code(reason)
                if off is not None:
                    verdicts[values < off if is_least(key) else values > off] = code("unmeasured")
        if factor and limits.min_face_px / factor >= SEEN_PX:
            verdicts[verdicts == code("unsure")] = code(DropReason.NO_FACE)
        return verdicts


def evidence(ledger: pa.Table) -> Evidence:
    """The evidence in a ledger's COLUMNS and verdicts; a CorruptShardError for a verdict that is not known."""
    known = pc.index_in(ledger["verdict"], value_set=pa.array(OUTCOMES))
    if known.null_count:
        raise CorruptShardError("a ledger holds a verdict that is not known")
    outcome = known.to_numpy().astype(np.int16)
    stage = pc.fill_null(pc.index_in(ledger["stage"], value_set=pa.array(list(STAGES))), -1).to_numpy()
    at = {name: number for number, name in enumerate(STAGES)}
    drops = {reason: outcome == code(reason) for reason in DropReason}

    sizes = {name: floats(ledger[name]) for name in ("meta_width", "meta_height", "width", "height")}
    side = np.fmin.reduce([np.full(len(outcome), np.inf), *sizes.values()])
    by_size = drops[DropReason.SMALL_IMAGE]
    # The other reasons of this stage come before the size.
    side[(stage == at[Metadata.name]) & ~by_size & ~drops[DropReason.DUPLICATE_URL]] = np.inf
    values = {"min_image_px": side, "max_pixels": np.nan_to_num(sizes["width"] * sizes["height"], nan=0.0)}
    outcome[by_size | drops[DropReason.TOO_MANY_PIXELS]] = code("unseen")
    outcome[drops[DropReason.NO_FACE] & (stage == at[Screen.name])] = code("unsure")

    faces = np.nan_to_num(floats(ledger["n_faces"]), nan=0.0)
    judged = stage >= at[Filter.name]
    outcome[judged & (faces == 0)] = code(DropReason.NO_FACE)
    outcome[judged & (faces > 1)] = code(DropReason.SEVERAL_FACES)
    one = judged & (faces == 1)
    # What is missing or undefined proves nothing: it fails any threshold.
    values["max_second_score"] = np.where(one, np.nan_to_num(floats(ledger["second_score"]), nan=np.inf), -np.inf)
    face = np.nan_to_num(floats(ledger["face_px"]), nan=-np.inf, posinf=np.inf)
    values["min_face_px"] = np.where(one, face, np.inf)
    for quality in QUALITIES:
        outcome[drops[quality.reason]] = code("passes")
    dropped = np.flatnonzero(one & (stage == at[Filter.name]))
    boxes = ledger.select(["bbox", "kps"]).take(pa.array(dropped)).to_pylist()
    spans = np.array([spans_a_face(row["bbox"], row["kps"]) for row in boxes], bool)
    outcome[dropped] = np.where(spans, code("passes"), code(DropReason.BAD_LANDMARKS))
    one[dropped[~spans]] = False

    by_points = posed(ledger["kps"], one)
    for quality in QUALITIES:
        name = quality.measure
        # Of angles the size, in the single precision of ledgers.
        measured = np.abs(by_points[name].astype(np.float32)) if name in by_points else floats(ledger[name])
        limited = np.fmax(measured, quality.off) if quality.is_least else np.fmin(measured, quality.off)
        if name in LATER:
            limited[np.isnan(measured)] = quality.off + (-1 if quality.is_least else 1)
        # Of those that a stage dropped for what comes before its thresholds, they judged none.
        earlier = drops[DropReason.BAD_EMBEDDING] | drops[DropReason.EMPTY_MASK]
        reached = one & (stage >= at[quality.stage]) & ~(earlier & (stage == at[quality.stage]))
        values[quality.key] = np.where(reached, limited, np.inf if quality.is_least else -np.inf)
    return Evidence(values, outcome)


def posed(kps: pa.ChunkedArray, chosen: Mask) -> dict[str, Doubles]:
    """FROM_POINTS -> (N,) what five points suggest, where chosen and known; NaN elsewhere."""
    rows = np.flatnonzero(chosen & pc.is_valid(kps).to_numpy())
    faces = points(kps.combine_chunks().take(pa.array(rows))).reshape(-1, 5, 2)
    values = np.full((len(FROM_POINTS), len(chosen)), np.nan)
    values[:, rows] = from_points(faces)
    return dict(zip(FROM_POINTS, values, strict=True))


def points(values: pa.ListArray) -> Doubles:
    """All numbers of (nested) lists without nulls."""
    while pa.types.is_list(values.type):
        values = values.flatten()
    numbers: Doubles = values.to_numpy(zero_copy_only=False).astype(np.float64)
    return numbers


def floats(column: pa.ChunkedArray) -> Doubles:
    """(N,) with NaN for null: exactly the numbers that a stage sees; a text counts as one unless it is empty."""
    if pa.types.is_string(column.type):
        column = pc.not_equal(column, "")
    values: Doubles = pc.cast(column, pa.float64()).to_numpy()
    return values


def ledgers(out: AnyPath, columns: Sequence[str], shards: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """These columns and the verdict of every ledger of OUT, each row of a part once, with its last verdict.

    `shards` are the names of all that are finished, where they were listed before.
    """
    shards = shard_names(out) if shards is None else shards
    rounds = Rounds(out, shards)
    read = partial(read_ledger, out, columns=[*columns, "row", "verdict"])
    for shard, ledger in zip(shards, of_each(out, read, shards), strict=True):
        if rounds.last(shard_origin(shard)[0]):
            ledger = ledger.filter(pa.array(~rounds.replaced(shard, ledger["row"])))
        yield ledger


def thresholds(out: AnyPath) -> tuple[FilterSettings, int]:
    """Those by which OUT was made, and what its screen had reduced photos by (0: it had none).

    Raises:
        OutputError: when dataset.json does not say.
    """
    try:
        settings = json.loads((out / DATASET).read_bytes())["plan"]["settings"]
        limits = FilterSettings.model_validate(settings["filter"])
        return limits, int(settings["models"].get("screen", {}).get("factor", 0))
    except RemoteError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise OutputError(f"{out / DATASET} does not say by which thresholds the dataset was made.") from error


def other_thresholds(limits: FilterSettings, path: Path | None, pairs: Sequence[str]) -> FilterSettings:
    """`limits` with what a TOML file and `--set` pairs say of filter.*.

    Raises:
        ConfigError: for any other key, or a value that is not allowed.
    """
    values = read_values(path, pairs)
    if other := sorted(set(values) - {"filter"}):
        if near := [one for one in other if one in FilterSettings.model_fields]:
            raise ConfigError(f"Unknown config key {near[0]!r}: did you mean 'filter.{near[0]}'?")
        raise ConfigError(f"Ledgers can be judged by other filter.* only: {', '.join(other)} needs a new run.")
    base: dict[str, Any] = {"filter": limits.model_dump()}
    merge(base, values)
    try:
        return Settings.model_validate(base).filter
    except ValidationError as error:
        raise ConfigError(explain(error, Settings)) from error


def replay(out: AnyPath, limits: FilterSettings, factor: int) -> tuple[Counter[str], Counter[str]]:
    """How many rows of OUT have each verdict, and become each of OUTCOMES under other thresholds.

    Few ledgers are in memory at a time.

    Raises:
        CorruptShardError: when a ledger cannot be read; names it.
        OutputError: when OUT is no dataset.
    """
    before, after = Counter[str](), Counter[str]()
    for ledger in gathered(ledgers(out, COLUMNS)):
        judged = np.bincount(evidence(ledger).judged(limits, factor), minlength=len(OUTCOMES))
        after.update(dict(zip(OUTCOMES, judged.tolist(), strict=True)))
        before.update(occurrences(ledger["verdict"]))
    return before, after


def lines(out: AnyPath, path: Path | None, pairs: Sequence[str]) -> Iterator[str | Table]:
    """What `replay` says of OUT under the thresholds of a TOML file and `--set` pairs; raises what `replay` raises."""
    shards_folder(out)
    before, factor = thresholds(out)
    after = other_thresholds(before, path, pairs)
    yield from (
        f"filter.{name}: {getattr(before, name)} -> {value}" for name, value in after if value != getattr(before, name)
    )
    old, new = replay(out, after, factor)
    table = Table("outcome", "before", "after", "change", box=box.ASCII)
    for column in table.columns[1:]:
        column.justify = "right"
    for outcome in OUTCOMES:
        if old[outcome] or new[outcome] or outcome == KEPT:
            counts = f"{old[outcome]:,}", f"{new[outcome]:,}", f"{new[outcome] - old[outcome]:+,}"
            table.add_row(outcome, *counts, style="bold" if outcome == KEPT else None)
    yield table
    yield f"Kept for certain: {new[KEPT]:,}; their samples are there."
    again = sum(new[outcome] for outcome in UNJUDGED)
    yield f"To be fetched again: {again:,} rows that may be wanted, which ledgers cannot judge{':' if again else '.'}"
    for outcome, meaning in UNJUDGED.items():
        if new[outcome]:
            yield f"  {new[outcome]:,} ({outcome}) {meaning}."
