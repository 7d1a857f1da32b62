"""The HTML report: the funnel, kept samples, and some of what was dropped. One file that needs nothing else."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import jinja2
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.finished.report_cards import Card
from pipeline.dataset.finished.report_pictures import LABEL_COLOURS
from pipeline.dataset.out.ledger import UNREADABLE, Funnel, funnel, read_ledger, read_manifests, shards_folder
from pipeline.shared import files as storage
from pipeline.shared.files import AnyPath
from pipeline.shared.tars import unpack
from schemas.drops import DropReason
from schemas.errors import CorruptShardError, OutputError
from schemas.shard import DATASET, Manifest
from stages.pixels.headers import DECODER_ERRORS

REPORT = "report.html"

_SAMPLES = 24
_STRIDE = 4
"""In a shard with plenty, every fourth sample is shown; never is more of a tar read than that takes."""
_DROPS = 4
"""Examples per reason."""
_PICTURE_BYTES = 3_000_000
_DROP_BYTES = 1_000_000
"""Bounds on the length of all pictures, as text."""
_DROP_COLUMNS = ("key", "url", "width", "height", "n_faces", "face_px", "det_score", "second_score", "bbox", "kps")

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Reason:
    """The drops for one reason."""

    name: str
    sentence: str
    count: int
    cards: list[Card]


def write_report(out: AnyPath) -> Funnel:
    """Write OUT/report.html from the finished shards of OUT, and return the funnel that it shows.

    Whatever the size of the dataset, all ledgers are counted, but few shards and few of their samples are opened.

    Raises:
        OutputError: when OUT is no dataset, or cannot be written.
        CorruptShardError: when a file of a shard that is read is damaged; names it.
    """
    shards_folder(out)
    manifests, counted = read_manifests(out), funnel(out)
    try:
        dataset = dict(json.loads((out / DATASET).read_bytes()))
    except FileNotFoundError:  # it was not copied along
        dataset = {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CorruptShardError(f"{DATASET}: cannot be read: {error}") from error
    plan = {**dataset, **vars(manifests[0])} if manifests else dataset
    samples = list(_kept_cards(out, manifests))
    labels = frozenset[int]().union(*(card.labels for card in samples))
    page = _TEMPLATES.get_template("report.html.jinja").render(
        profile=plan.get("profile", ""),
        plan_digest=plan.get("plan_digest", ""),
        models=plan.get("models", []),
        finished="shards" in dataset,
        funnel=counted,
        samples=samples,
        reasons=list(_reasons(out, manifests, counted)),
        labels=[(name, rgb) for n, (name, rgb) in enumerate(LABEL_COLOURS.items()) if n in labels and n],
    )
    path = out / REPORT
    try:
        storage.write(path, page.encode("utf-8", "replace"))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error
    return counted


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


def _kept_cards(out: AnyPath, manifests: list[Manifest]) -> Iterator[Card]:
    length, kept = 0, {manifest.shard: manifest.kept for manifest in manifests}
    for shard, quota in sorted(quotas(manifests, _SAMPLES).items()):
        path, stride = out / "shards" / f"{shard}.tar", min(_STRIDE, kept[shard] // quota)
        for sample in islice(unpack(path), 0, quota * stride, stride):
            try:
                card = Card.of_sample(sample)
            except DECODER_ERRORS as error:
                raise CorruptShardError(f"{path.name}: {sample.key} cannot be shown: {error}") from error
            length += card.length
            if length > _PICTURE_BYTES:
                return
            yield card


def _reasons(out: AnyPath, manifests: list[Manifest], counted: Funnel) -> Iterator[Reason]:
    """A few drops per reason, whichever stages gave it: from several shards, those with a picture first."""
    left = _DROP_BYTES
    totals: Counter[str] = Counter()
    for stage in counted.rows:
        totals.update(stage.dropped)
    for name, count in totals.items():
        ranked: list[tuple[bool, int, Card]] = []
        for manifest in spread([manifest for manifest in manifests if manifest.dropped.get(name)], _DROPS):
            thumbnails: dict[str, bytes] = {}
            if left > 0:
                with suppress(*UNREADABLE):  # the file is disposable
                    drops = storage.parquet(out / "drops" / f"{manifest.shard}.parquet")
                    table = drops.read(columns=["key", "verdict", "thumbnail"])
                    thumbnails = {row["key"]: row["thumbnail"] for row in table.to_pylist() if row["verdict"] == name}
            rows = read_ledger(out, manifest.shard, _DROP_COLUMNS, name)
            shown = pc.is_in(rows["key"], pa.array(list(thumbnails), pa.string()))
            rows = pa.concat_tables([rows.filter(shown), rows.filter(pc.invert(shown))]).slice(0, _DROPS)
            for rank, record in enumerate(rows.to_pylist()):
                card = Card.of_drop(record, thumbnails.get(record["key"]))
                ranked.append((not card.pictures, rank, card))
        cards = [card for *_, card in sorted(ranked, key=lambda entry: entry[:2])[:_DROPS]]
        left -= sum(card.length for card in cards)
        sentence = next((known.sentence for known in DropReason if known == name), "")
        yield Reason(name, sentence, count, cards)
