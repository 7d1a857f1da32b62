"""The HTML report: what became of all rows, and what was measured of them. One file that needs nothing else."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import chain, count, islice, starmap
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from pipeline.dataset.finished import replay, report_numbers
from pipeline.dataset.finished.replay import evidence, thresholds
from pipeline.dataset.finished.report_cards import LABEL_COLOURS, Card
from pipeline.dataset.finished.report_explorer import Explorer, distances, row_data
from pipeline.dataset.finished.report_numbers import Numbers
from pipeline.dataset.finished.report_persons import persons
from pipeline.dataset.out.ledger import (
    UNREADABLE,
    Funnel,
    funnel,
    gathered,
    read_dataset,
    read_ledger,
    shards_folder,
)
from pipeline.shared import files as storage
from pipeline.shared.configfile import leaves
from pipeline.shared.files import AnyPath, RemotePath
from pipeline.shared.page import rendered
from pipeline.shared.tars import Sample, samples, unpack_one
from schemas.columns import KEPT
from schemas.drops import DropReason
from schemas.errors import CorruptShardError, OutputError
from schemas.names import shard_origin
from schemas.shard import DATASET, Manifest
from stages.filter import QUALITIES
from stages.pixels.headers import DECODER_ERRORS
from stages.settings import FilterSettings

REPORT = "report.html"

_SAMPLES = 24
_STRIDE = 4
"""In a shard with plenty, every fourth sample is shown; never is more of a tar read than that takes."""
_DROPS = 4
"""Examples per reason."""
_BARELY = 8
"""Examples per reason that is a threshold, and of kept samples that are near one."""
_NEAR = 0.15
"""Share of a threshold."""
_BY_THRESHOLD = (DropReason.SEVERAL_FACES, DropReason.SMALL_FACE, *(quality.reason for quality in QUALITIES))
_HOSTS = 15
_PERSON_SHARDS = 4
_OPEN = 16
"""Ledgers that are held for further reasons; mostly these are looked for in the same shards."""
_PICTURE_BYTES = 3_000_000
_DROP_BYTES = 1_000_000
"""Bounds on the length of all pictures, as text."""

_JUDGED = ("key", "verdict", *replay.COLUMNS)

T = TypeVar("T")


def write_report(
    out: AnyPath,
    *,
    pictures: bool = True,
    drops: bool = True,
    target: AnyPath | None = None,
    shown_on: Console | None = None,
) -> Funnel:
    """Write OUT/report.html from the finished shards of OUT, and return the funnel that it shows.

    Whatever the size of the dataset, all ledgers are counted, but few shards and few of their samples are opened.
    Without `pictures`, no face is shown; without `drops`, no dropped row. It can be written to another `target`;
    `shown_on` is told how far it is.

    Raises:
        OutputError: when OUT is no dataset, or cannot be written.
        CorruptShardError: when a file of a shard that is read is damaged; names it.
    """
    shards_folder(out)
    dataset = read_dataset(out) if (out / DATASET).exists() else {}  # it may not have been copied along
    explorer, limits, numbers = None, FilterSettings(), Numbers()
    with suppress(OutputError):  # nothing says by which thresholds the shards were made
        explorer = Explorer(*thresholds(out))
        limits = explorer.limits

    def add(ledger: pa.Table) -> None:
        numbers.add(ledger)
        if explorer:
            explorer.add(evidence(ledger))

    counted = funnel(out, [*replay.COLUMNS, *report_numbers.COLUMNS], add, shown_on)
    manifests = counted.manifests
    plan = {**dataset, **vars(manifests[0])} if manifests else dataset
    grouped = "group" in dataset.get("plan", {}).get("settings", {})
    number = count()
    kept = _numbered(_kept_cards(out, manifests, limits), number, pictures)
    reasons = [
        {**reason, "cards": _numbered(reason["cards"] if drops else [], number, pictures)}
        for reason in _reasons(out, manifests, limits, counted)
    ]
    cards = chain(kept, *(reason["cards"] for reason in reasons))
    labels = frozenset[int]().union(*(card.labels for card in kept)) - {0}
    page = rendered(
        Path(__file__).with_name("report"),
        data={
            "explorer": explorer.data() if explorer else None,
            "cards": [{"row": card.row, "values": card.values, "facts": " · ".join(card.facts)} for card in cards],
        },
        profile=plan.get("profile", ""),
        plan_digest=plan.get("plan_digest", ""),
        models=manifests[0].models if manifests else [],
        finished="shards" in dataset,
        settings=leaves(dataset.get("plan", {}).get("settings", {})),
        funnel=counted,
        tar_bytes=sum(manifest.files.get(f"{manifest.shard}.tar", {}).get("bytes", 0) for manifest in manifests),
        parts=_parts(manifests),
        numbers=numbers,
        charts=list(report_numbers.charts(numbers.histograms)),
        persons=persons(out, spread(manifests, _PERSON_SHARDS), manifests, pictures=pictures) if grouped else None,
        hosts=numbers.largest_hosts(_HOSTS),
        fates=report_numbers.FATES,
        samples=kept,
        reasons=reasons,
        labels=[named for label, named in enumerate(LABEL_COLOURS.items()) if label in labels],
        unjudged=replay.UNJUDGED,
        meanings={name: known.description for name, known in FilterSettings.model_fields.items()},
    )
    path = target or out / REPORT
    with storage.writing(path):
        storage.write(path, page)
    return counted


def _parts(manifests: Sequence[Manifest]) -> list[tuple[str, Counter[str]]]:
    """Name, and shards, rows and kept rows of each part; a row that had a second chance counts in every round."""
    parts: dict[str, Counter[str]] = defaultdict(Counter)
    for one in manifests:
        parts[shard_origin(one.shard)[0]].update(shards=1, rows=one.rows_in, kept=one.kept)
    return sorted(parts.items())


def _numbered(cards: Iterable[Card], number: Iterator[int], pictures: bool) -> list[Card]:
    bare: dict[str, Any] = {} if pictures else {"pictures": [], "labels": frozenset()}
    return [replace(card, number=next(number), **bare) for card in cards]


def spread(items: Sequence[T], count: int) -> list[T]:
    """Up to `count` items, evenly spaced over the sequence, the first among them."""
    step = max(len(items) / count, 1)
    return [items[int(n * step)] for n in range(min(count, len(items)))]


def quotas(manifests: Sequence[Manifest], wanted: int) -> Counter[str]:
    """How many kept samples to show of which shards: as many shards as possible, and all alike."""
    chosen = spread([manifest for manifest in manifests if manifest.kept], wanted)
    given: Counter[str] = Counter()
    wanted = min(wanted, sum(manifest.kept for manifest in chosen))
    while given.total() < wanted:
        hungry = [manifest.shard for manifest in chosen if manifest.kept > given[manifest.shard]]
        given.update(hungry[: wanted - given.total()])
    return given


def _kept_cards(out: AnyPath, manifests: Sequence[Manifest], limits: FilterSettings) -> Iterator[Card]:
    """Kept samples from all over the dataset, and some that are barely so; of tars behind a network few of these."""
    length, kept = 0, {manifest.shard: manifest.kept for manifest in manifests}
    chosen = quotas(manifests, _SAMPLES)
    barely, left = -(-_BARELY // max(len(chosen), 1)), _BARELY if isinstance(out, RemotePath) else _SAMPLES + _BARELY
    for shard, quota in sorted(chosen.items()):
        path, stride = out / "shards" / f"{shard}.tar", min(_STRIDE, kept[shard] // quota)
        rows = _judged(read_ledger(out, shard, _JUDGED, KEPT), limits)
        seen = range((quota - 1) * stride + 1)
        near = sorted((far, key) for number, (key, _, far) in enumerate(rows) if far < _NEAR and number not in seen)
        near = near[: min(barely, left)]
        left -= len(near)
        others = (unpack_one(path, key, _is_shown) for _, key in near)
        tar = chain(islice(starmap(Sample, samples(path, wish=_is_shown)), len(seen)), filter(None, others))
        judged = {key: row for key, row, _ in rows}
        for number, sample in enumerate(tar):
            if number % stride and number in seen:
                continue
            try:
                card = Card.of_sample(sample, json.loads(sample.files["json"]))
            except DECODER_ERRORS as error:
                raise CorruptShardError(f"{path.name}: {sample.key} cannot be shown: {error}") from error
            length += card.length
            if length > _PICTURE_BYTES:
                return
            yield replace(card, row=judged.get(sample.key, []))


def _is_shown(suffix: str) -> bool | None:
    return suffix.endswith(("json", "jpg", "png")) or None


def _judged(ledger: pa.Table, limits: FilterSettings) -> list[tuple[str, list[float], float]]:
    """Key, what thresholds judge, and the distance to the nearest of them, of each row."""
    rows = evidence(ledger)
    keys, far = ledger["key"].to_pylist(), distances(rows, limits).tolist()
    return [(key, row_data(rows, number), far[number]) for number, key in enumerate(keys)]


def _reasons(
    out: AnyPath, manifests: Sequence[Manifest], limits: FilterSettings, counted: Funnel
) -> Iterator[dict[str, Any]]:
    """Name, sentence, count and `cards` of each reason: a few, from several shards, those with a picture first.

    Of what a threshold dropped there are more, and those that it barely dropped come first.
    """
    left = _DROP_BYTES

    @lru_cache(_OPEN)
    def ledger(shard: str) -> pa.Table:
        return read_ledger(out, shard, ["url", "source_file", *_JUDGED])

    @lru_cache(_OPEN)
    def drops(shard: str) -> list[dict[str, Any]]:
        with suppress(*UNREADABLE):  # the file is disposable
            table = storage.parquet(out / "drops" / f"{shard}.parquet")
            return list(table.read(columns=["key", "verdict", "thumbnail"]).to_pylist())
        return []

    for name, dropped in counted.dropped.items():
        wanted = _BARELY if name in _BY_THRESHOLD else _DROPS
        chosen: list[pa.Table] = []
        shown: list[tuple[int, bytes | None]] = []
        for manifest in spread([manifest for manifest in manifests if manifest.dropped.get(name)], wanted):
            own = drops(manifest.shard) if left > 0 else []
            thumbnails = {row["key"]: row["thumbnail"] for row in own if row["verdict"] == name}
            rows = ledger(manifest.shard)
            rows = rows.filter(pc.equal(rows["verdict"], name))
            first = pc.is_in(rows["key"], pa.array(list(thumbnails), pa.string()))
            chosen.append(pa.concat_tables([rows.filter(first), rows.filter(pc.invert(first))]).slice(0, wanted))
            shown += [(rank, thumbnails.get(key)) for rank, key in enumerate(chosen[-1]["key"].to_pylist())]
        ranked: list[tuple[bool, float, int, Card]] = []
        judged = chain(*(zip(rows.to_pylist(), _judged(rows, limits), strict=True) for rows in gathered(chosen)))
        for (record, (_, row, far)), (rank, thumbnail) in zip(judged, shown, strict=True):
            card = replace(Card.of_drop(record, thumbnail), row=row)
            ranked.append((not card.pictures, far, rank, card))
        cards = [card for *_, card in sorted(ranked, key=lambda entry: entry[:3])[:wanted]]
        left -= sum(card.length for card in cards)
        sentence = next((known.sentence for known in DropReason if known == name), "")
        yield {"name": name, "sentence": sentence, "count": dropped, "cards": cards}
