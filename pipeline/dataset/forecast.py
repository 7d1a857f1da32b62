"""What the whole of SHARDS would give and cost: some of its rows are run for real, the rest is extrapolated."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import ceil, inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console

from pipeline.dataset.config import WatchSettings
from pipeline.dataset.estimate import Range, count, rate, total
from pipeline.dataset.execute.make_shard import Advanced, Event
from pipeline.dataset.finished.replay import COLUMNS, THRESHOLDS, code, evidence, ledgers, thresholds
from pipeline.dataset.job import Job, make_dataset
from pipeline.dataset.out.forgotten import load, save
from pipeline.dataset.out.ledger import funnel, occurrences, shard_names
from pipeline.dataset.out.output import Output, by_part, refuse_surplus
from pipeline.dataset.rows import split_seeds
from pipeline.dataset.source.seeds import Captions, Draw, Seeds
from pipeline.shared.files import AnyPath, RemotePath, sizes
from pipeline.shared.tars import Span, samples
from pipeline.shared.terminal import Screen
from schemas.columns import KEPT
from schemas.drops import DropReason
from schemas.errors import ExitCode, LostError, OutputError
from schemas.names import shard_name
from stages.download import Download
from stages.filter import is_least
from stages.metadata import Metadata
from stages.settings import FilterSettings

KEPT_BYTES, FETCHED_BYTES = 2.2e6, 3e5
"""Of a sample, and of a photo, where the drawn rows gave none (docs/scaling.md)."""
_MACHINE = 1.2
"""How much slower or faster the same machine and network may be at another time."""
_NO_PACE = 3.0
"""The same, where all rows that were drawn came in one batch, so that their time cannot be parted from the start's."""
_FEWEST_ROWS = 16
"""Rows that a worker gets at least."""
_WHOLE = 200_000
"""Rows of a job that is run as it is where the sample takes all that pass: of more, those that do not are left out."""


@dataclass
class Counted:
    """All of SHARDS as far as metadata goes: counted, not estimated."""

    rows: int = 0
    shards: int = 0
    done: int = 0
    """Shards that are finished in OUT."""
    candidates: int = 0
    """Rows that pass the metadata filter."""
    captions: Captions = field(default_factory=Captions)
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows that do not."""
    seconds: float = 0.0
    """To read and judge it all."""
    dead_bytes: float = 0.0
    """Of the ledgers, for rows that do not pass."""


def counted(job: Job, output: Output, screen: Console, draw: Draw | None) -> Counted:
    """Go through the metadata of all parts once; with `draw`, draw from it as well.

    Raises:
        SourceError: without `draw`, for finished shards of other rows than their part gives them now.
    """
    counts, listed, begun = Counted(), sizes(output.shards), time.monotonic()
    surplus = by_part(listed if draw is None else ())
    measured_rows = measured_bytes = 0
    with Screen(screen, "metadata", "{done:,} of {total} rows of metadata", job.rows) as bar:
        for seeds in job.shards():
            counts.rows += seeds.table.num_rows
            counts.shards += 1
            counts.candidates += seeds.candidates
            counts.captions.add(seeds)
            surplus[seeds.part].discard(seeds.name)
            if draw is not None:  # a forecast is of SHARDS, whatever OUT holds
                counts.done += output.is_done(seeds.name, job.plan, listed)
            elif output.is_done(seeds.name, job.plan, listed, seeds.table.num_rows):
                output.require_same_files(seeds.name, seeds.table)
                counts.done += 1
            counts.dropped = dict(Counter(counts.dropped) + occurrences(seeds.table["verdict"].drop_null()))
            if draw is not None:
                draw.add(seeds)
                if seeds.name == shard_name(seeds.part, 0):  # one of each part is measured
                    dead, ledger = split_seeds(seeds.table).dead, pa.BufferOutputStream()
                    pq.write_table(dead, ledger, compression="zstd")
                    measured_rows += dead.num_rows
                    measured_bytes += ledger.tell() if dead.num_rows else 0
            bar.advance(seeds.table.num_rows, f"{counts.candidates:,} pass")
    for part in job.parts:
        refuse_surplus(surplus[part.name])
    counts.seconds = time.monotonic() - begun
    counts.dead_bytes = (counts.rows - counts.candidates) * measured_bytes / max(1, measured_rows)
    return counts


@dataclass(frozen=True)
class Sampled(Job):
    drawn: tuple[Seeds, ...]

    @property
    def rows(self) -> int:
        return sum(seeds.table.num_rows for seeds in self.drawn)

    def shards_by_part(self) -> Iterator[Iterable[Seeds]]:
        """All with the first part: which row is of which, each row says."""
        return iter([self.drawn, *[()] * (len(self.parts) - 1)])

    @staticmethod
    def of(job: Job, rows: pa.Table) -> "Sampled":
        """In shards as they are, but that each worker gets some."""
        executor = job.plan.config.executor
        workers = 1 if executor.name == "local" else executor.gpus or executor.workers
        size = min(job.plan.config.source.rows_per_shard, max(_FEWEST_ROWS, ceil(rows.num_rows / workers)))
        tables = [rows.slice(start, size).combine_chunks() for start in range(0, rows.num_rows, size)]
        seeds = [Seeds(shard_name("forecast", n), "forecast", table) for n, table in enumerate(tables)]
        return Sampled(job.plan, job.parts, tuple(seeds))


@dataclass
class Clock:
    """When a run's events came; seconds."""

    begun: float = field(default_factory=time.monotonic)
    batches: list[tuple[float, int, float]] = field(default_factory=list)
    """(when, rows, waited for images) of all that had rows."""
    last: float = 0.0
    """The last event: the last shard is done."""
    ended: float = 0.0
    """All is written, the report too."""

    def __call__(self, event: Event) -> None:
        self.last = time.monotonic()
        if isinstance(event, Advanced) and (rows := event.outcomes.total()):
            self.batches.append((self.last, rows, event.microseconds[Download.name] / 1e6))

    def seconds(self, population: int, shards: int, at_a_time: int) -> Range:
        """The time of a run over so many rows, but for reading the metadata.

        What a run needs once is counted once: until the first rows are through, and to write the report. Each further
        batch tells what a row costs, without the time in which its images were waited for. This belongs to a shard (all
        of its downloads begin at once, and the last ones are late), or, if they fill the line, to a row, or is hidden
        by other shards; so it counts by the shards, up to by the rows, or not at all.
        """
        first, rows_first, waited_first = self.batches[0]
        rows = sum(rows for _, rows, _ in self.batches)
        waited = sum(waited for _, _, waited in self.batches) / at_a_time
        once = Range.within(first - waited_first - self.begun + self.ended - self.last, _MACHINE)
        if len(self.batches) > 2 and self.last > first:
            ends = np.array([when for when, _, _ in self.batches])
            ends[-1] = self.last
            later = np.array([(rows, waited) for _, rows, waited in self.batches[1:]], np.float64)
            work = np.maximum(np.diff(ends) - later[:, 1] / at_a_time, 0.0)
            each = rate(work, later[:, 0])
            each = Range(each.estimate, each.low / _MACHINE, each.high * _MACHINE)
        else:
            each = Range.within((self.last - self.begun) / rows, _NO_PACE)
        by_rows = waited * population / rows
        waits = Range(min(by_rows, waited * ceil(shards / at_a_time)), 0.0, by_rows * _MACHINE)
        return once + each * (population - rows_first) + waits


@dataclass(frozen=True)
class Loss:
    cause: str
    """A reason, or `filter.*` = value."""
    rows: float
    """Of all candidates (of all rows, where metadata tells)."""
    share: float
    """Of those that get so far."""


def forecast(job: Job, out: AnyPath, counts: Counted, draw: Draw, screen: Console) -> dict[str, Any]:
    """Run the drawn rows into a folder that goes away, and extrapolate. What OUT is to forget is not fetched.

    At least one row has to pass the metadata filter.

    Raises:
        OutputError: on a cluster that shares no disk with this machine.
        LostError: when a shard of them failed.
    """
    is_whole = draw.size >= draw.population and counts.rows <= _WHOLE
    run = job if is_whole else Sampled.of(job, draw.rows())
    shared = None
    if job.plan.config.executor.ray_address:  # on a disk of all nodes, as OUT is
        if isinstance(out, RemotePath):
            raise OutputError(f"A forecast on a cluster needs an OUT on a disk that its nodes share: {out} is none.")
        shared = next(folder for folder in Path(str(out)).absolute().parents if folder.is_dir())
    with TemporaryDirectory(prefix=".faceshards-forecast-", dir=shared) as name:
        folder, clock = Path(name), Clock()
        unwatched = job.plan.config.model_copy(update={"watch": WatchSettings()})
        run = replace(run, plan=replace(job.plan, config=unwatched))
        save(folder, load(out))
        clock.begun = time.monotonic()
        if make_dataset(run, folder, screen, watch=clock) is not ExitCode.OK:
            raise LostError("Not all of the drawn rows could be run (see above), so there is no forecast.")
        clock.ended = time.monotonic()
        return extrapolated(job, folder, counts, draw, clock, is_whole=is_whole)


def extrapolated(
    job: Job, folder: Path, counts: Counted, draw: Draw, clock: Clock, *, is_whole: bool
) -> dict[str, Any]:
    """From the OUT of the drawn rows to the whole of SHARDS; JSON-able where dataclasses become dicts."""
    ledger = pa.concat_tables(ledgers(folder, [*COLUMNS, "key", "part", "n_bytes"]))
    if is_whole:
        ledger = ledger.filter(pc.not_equal(ledger["stage"], Metadata.name))
    size, population = ledger.num_rows, counts.candidates
    keys = ledger.filter(pc.equal(ledger["verdict"], KEPT))["key"].to_pylist()
    local = [part.name for part in job.parts if part.kind != "metadata"]
    is_here = pc.is_in(ledger["part"], pa.array(local, pa.string()))
    n_bytes = pc.if_else(is_here, 0, pc.fill_null(ledger["n_bytes"], 0)).to_numpy().astype(np.float64)
    early = pc.and_(pc.equal(ledger["verdict"], DropReason.SMALL_IMAGE), pc.equal(ledger["stage"], Download.name))
    early = pc.and_not(early, is_here).to_numpy()
    shards = shard_names(folder)
    files = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    executor = job.plan.config.executor
    if is_whole:
        kept, fetched = Range.within(len(keys)), Range.within(float(n_bytes.sum()))
        disk = Range.within(sum(files.values()), 1.001)  # times of day in the report
        seconds = Range.within(clock.ended - clock.begun, _MACHINE)
    else:
        kept = count(len(keys), size, population)
        fetched = Range.within(0.0) if pc.all(is_here).as_py() else total(n_bytes, population, FETCHED_BYTES)
        disk = _on_disk(folder, files, keys, size, counts)
        at_a_time = 1 if executor.name == "local" else min(len(shards), executor.workers + 1)
        seconds = clock.seconds(population, counts.shards, at_a_time)
        seconds += Range.within(counts.seconds, _MACHINE)
    limits, factor = thresholds(folder)
    hours, cores, gpus = seconds * (1 / 3600), 1 if executor.name == "local" else executor.workers, executor.gpus
    return {
        "run": size,  # rows that were run for real
        "seed": draw.seed,
        "counted": counts,
        "is_exact": is_whole or size == population,  # these were all rows: only the time is a guess for the next run
        "kept_of_run": len(keys),
        "kept": kept,
        "bytes_fetched": fetched,  # image files that arrive whole, but for those of existing downloads and folders
        "given_up": float(early.sum()) * population / max(1, size),  # whose first bytes show that they are too small
        "bytes_on_disk": disk,  # all of OUT
        "wall_hours": hours,
        "cores": cores,  # that are held for the run
        "gpus": gpus,
        # By what drops the largest share of those that get so far.
        "reasons": _reasons(folder, counts, population / max(1, size)),
        # What each of filter.* ends by itself: without it, these rows would go on.
        "thresholds": _by_thresholds(ledger, limits, factor, counts),
        "gpu_hours" if gpus else "core_hours": hours * (gpus or cores),
    }


def _on_disk(folder: Path, files: dict[Path, int], keys: list[str], size: int, counts: Counted) -> Range:
    """Samples by those that were kept, ledgers by the row, what else a shard has by the shard, all else once."""
    in_tar: dict[str, float] = {}
    tars, shards = 0, shard_names(folder)
    for path in (folder / "shards" / f"{shard}.tar" for shard in shards):
        tars += files[path]
        for key, spans in samples(path, wish=lambda suffix: False):
            in_tar[key] = sum(512 * (1 + ceil(span.size / 512)) for span in spans.values() if isinstance(span, Span))
    amounts = np.array([in_tar[key] for key in keys] + [0.0] * (size - len(keys)))
    once = sum(length for path, length in files.items() if path.parent == folder)
    by_row = sum(length for path, length in files.items() if path.match("shards/*.parquet"))
    by_shard = sum(files.values()) - once - by_row - tars
    rest = once + counts.dead_bytes + by_row * counts.candidates / size + by_shard * counts.shards / len(shards)
    return total(amounts, counts.candidates, KEPT_BYTES) + Range.within(rest, _MACHINE)


def _reasons(folder: AnyPath, counts: Counted, weight: float) -> list[Loss]:
    """What the funnel loses, by the share of the rows that come to the stage."""
    losses = [Loss(f"{reason} (metadata)", n, n / counts.rows) for reason, n in counts.dropped.items()]
    for row in funnel(folder).rows:
        if row.stage != Metadata.name:
            losses += [Loss(f"{why} ({row.stage})", n * weight, n / row.rows_in) for why, n in row.dropped.items()]
    return sorted(losses, key=lambda loss: -loss.share)


def _by_thresholds(ledger: pa.Table, limits: FilterSettings, factor: int, counts: Counted) -> list[Loss]:
    """What the ledger says of each threshold, if it alone were lifted, and what metadata does."""
    proof = evidence(ledger)
    now = proof.judged(limits, factor)
    goes_on = [code(KEPT), code("passes"), code("unseen")]
    losses = []
    for name in THRESHOLDS:
        without = limits.model_copy(update={name: -inf if is_least(name) else inf})
        gained = int((np.isin(proof.judged(without, factor), goes_on) & ~np.isin(now, goes_on)).sum())
        rows = gained * counts.candidates / max(1, ledger.num_rows)
        before = counts.dropped.get(DropReason.SMALL_IMAGE, 0) if name == "min_image_px" else 0
        losses.append(
            Loss(f"filter.{name} = {getattr(limits, name):g}", rows + before, (rows + before) / max(1, counts.rows))
        )
    return sorted(losses, key=lambda loss: -loss.rows)
