"""The HTML report: the funnel, kept samples, and some of what was dropped. One file that needs nothing else."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.finished.report_pictures import LABEL_COLOURS, data_uri, marked, masked, reduced
from pipeline.dataset.out.ledger import UNREADABLE, Funnel, funnel, read_ledger, read_manifests, shards_folder
from pipeline.shared import files as storage
from pipeline.shared.files import AnyPath
from pipeline.shared.tars import Sample, unpack
from schemas.drops import DropReason
from schemas.errors import CorruptShardError, OutputError
from schemas.shard import DATASET, Manifest
from stages.pixels.headers import DECODER_ERRORS
from stages.pixels.images import decode_jpeg, decode_png

REPORT = "report.html"

_SAMPLES = 24
_STRIDE = 4
"""In a shard with plenty, every fourth sample is shown; never is more of a tar read than that takes."""
_DROPS = 4
"""Examples per reason."""
_PHOTO_PX, _CROP_PX, _DROP_PX = 448, 192, 192
_PICTURE_BYTES = 3_000_000
_DROP_BYTES = 1_000_000
"""Bounds on the length of all pictures, as text."""
_TEXT_LENGTH = 300
_CROPS = ("portrait", "half", "full")
_DROP_COLUMNS = ("key", "url", "width", "height", "n_faces", "face_px", "det_score", "second_score", "bbox", "kps")

T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """One picture of a card, or why it is not there."""

    title: str
    uri: str = ""
    absent: str = ""


@dataclass(frozen=True)
class Card:
    """One row of the dataset as the page shows it."""

    key: str
    text: str
    url: str
    facts: list[str]
    pictures: list[Picture] = field(default_factory=list)
    labels: frozenset[int] = frozenset()
    """Labels that occur in its mask."""

    @property
    def length(self) -> int:
        """Characters of its pictures."""
        return sum(len(picture.uri) for picture in self.pictures)


@dataclass(frozen=True)
class Reason:
    """The drops for one reason."""

    name: str
    sentence: str
    count: int
    cards: list[Card]


def write_report(out: AnyPath) -> AnyPath:
    """Write OUT/report.html from the finished shards of OUT, and return its path.

    Whatever the size of the dataset, all ledgers are counted, but few shards and few of their samples are opened.

    Raises:
        OutputError: when OUT is no dataset, or cannot be written.
        CorruptShardError: when a file of a shard that is read is damaged; names it.
    """
    shards_folder(out)
    manifests, counted = read_manifests(out), funnel(out)
    try:
        dataset = json.loads((out / DATASET).read_bytes())
    except FileNotFoundError:  # it was not copied along
        dataset = {}
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptShardError(f"{DATASET}: cannot be read: {error}") from error
    plan = manifests[0] if manifests else None
    known = dataset if isinstance(dataset, dict) else {}
    samples = list(_kept_cards(out, manifests))
    labels = frozenset[int]().union(*(card.labels for card in samples))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        profile=plan.profile if plan else known.get("profile", ""),
        plan_digest=plan.plan_digest if plan else known.get("plan_digest", ""),
        models=plan.models if plan else [],
        finished="shards" in known,
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
    return path


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
                card = _kept_card(sample)
            except DECODER_ERRORS as error:
                raise CorruptShardError(f"{path.name}: {sample.key} cannot be shown: {error}") from error
            length += card.length
            if length > _PICTURE_BYTES:
                return
            yield card


def _kept_card(sample: Sample) -> Card:
    content = json.loads(sample.files["json"])
    crops = {name: decode_jpeg(sample.files[f"{name}.jpg"]) for name in _CROPS if f"{name}.jpg" in sample.files}
    face, mask = decode_jpeg(sample.files["face.jpg"]), decode_png(sample.files["mask.png"])
    described = content["crops"]
    # The whole photo, or the widest crop that there is, with box and points.
    widest = next((name for name in reversed(_CROPS) if name in crops), None)
    if widest is None:
        pictures = [Picture("photo", absent=described["full"]["absent"])]
    else:
        photo = marked(crops[widest], _PHOTO_PX, described[widest]["box"], content["bbox"], content["kps"])
        title = "photo" if widest == "full" else f"{widest} (no full: {described['full']['absent']})"
        pictures = [Picture(title, data_uri(photo))]
    pictures += [
        Picture("face", data_uri(reduced(face, _CROP_PX))),
        Picture("mask", data_uri(masked(face, mask, _CROP_PX))),
    ]
    for name in ("portrait", "half"):
        if name in crops:
            pictures.append(Picture(f"{name} {crops[name].shape[1]} px", data_uri(reduced(crops[name], _CROP_PX))))
        else:
            pictures.append(Picture(name, absent=_shortened(described[name]["absent"])))
    text, url = _shortened(content["text"]), _shortened(content["url"])
    return Card(sample.key, text, url, _facts(content), pictures, frozenset(np.unique(mask).tolist()))


_FACTS = {
    "face_px": "face {:.0f} px",
    "n_faces": "faces {}",
    "det_score": "score {:.2f}",
    "second_score": "second {:.2f}",
    "sharpness": "sharpness {:.0f}",
    "brightness": "brightness {:.0f}",
    "roll_deg": "roll {:.0f}°",
    "mask_share": "mask {:.0%}",
    "embedding_norm": "norm {:.1f}",
}


def _facts(record: dict[str, Any]) -> list[str]:
    """Sizes and scores in words, as far as they were measured."""
    size = [f"{record['width']} × {record['height']}"] if record["width"] and record["height"] else []
    return size + [text.format(record[name]) for name, text in _FACTS.items() if record.get(name) is not None]


def _shortened(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= _TEXT_LENGTH else f"{text[:_TEXT_LENGTH]}…"


def _reasons(out: AnyPath, manifests: list[Manifest], counted: Funnel) -> Iterator[Reason]:
    """Examples per reason, whichever stages gave it, in the funnel's order."""
    left = _DROP_BYTES
    totals: Counter[str] = Counter()
    for row in counted.rows:
        totals.update(row.dropped)
    for name, count in totals.items():
        cards = _drop_cards(out, manifests, name, pictured=left > 0)
        left -= sum(card.length for card in cards)
        sentence = next((known.sentence for known in DropReason if known == name), "")
        yield Reason(name, sentence, count, cards)


def _drop_cards(out: AnyPath, manifests: list[Manifest], reason: str, *, pictured: bool) -> list[Card]:
    """A few rows that were dropped for a reason: from several shards, those with a picture first."""
    ranked: list[tuple[bool, int, Card]] = []
    for manifest in spread([manifest for manifest in manifests if manifest.dropped.get(reason)], _DROPS):
        thumbnails: dict[str, bytes] = {}
        if pictured:
            with suppress(*UNREADABLE):  # the file is disposable
                drops = storage.parquet(out / "drops" / f"{manifest.shard}.parquet")
                table = drops.read(columns=["key", "verdict", "thumbnail"])
                thumbnails = {row["key"]: row["thumbnail"] for row in table.to_pylist() if row["verdict"] == reason}
        rows = read_ledger(out, manifest.shard, _DROP_COLUMNS, reason)
        shown = pc.is_in(rows["key"], pa.array(list(thumbnails), pa.string()))
        rows = pa.concat_tables([rows.filter(shown), rows.filter(pc.invert(shown))]).slice(0, _DROPS)
        for rank, record in enumerate(rows.to_pylist()):
            card = Card(record["key"], "", _shortened(record["url"]), _facts(record))
            if record["key"] in thumbnails:
                image = decode_jpeg(thumbnails[record["key"]])
                height, width = image.shape[:2]
                frame = (0, 0, record["width"] or width, record["height"] or height)
                photo = marked(image, _DROP_PX, frame, record["bbox"], record["kps"])
                card.pictures.append(Picture("", data_uri(photo)))
            ranked.append((not card.pictures, rank, card))
    ranked.sort(key=lambda entry: entry[:2])
    return [card for *_, card in ranked[:_DROPS]]
