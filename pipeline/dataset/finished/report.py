"""The HTML report: the funnel, kept samples, and some of what was dropped. One file that needs nothing else."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
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
from stages.models.backends import Image
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
    page = _environment().get_template("report.html.jinja").render(_context(out))
    path = out / REPORT
    try:
        storage.write(path, page.encode("utf-8", "replace"))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _context(out: AnyPath) -> dict[str, Any]:
    manifests, dataset, counted = read_manifests(out), _dataset(out), funnel(out)
    first = manifests[0] if manifests else None
    samples = list(_kept_cards(out, manifests))
    labels = frozenset[int]().union(*(card.labels for card in samples))
    return {
        "profile": first.profile if first else dataset.get("profile", ""),
        "plan_digest": first.plan_digest if first else dataset.get("plan_digest", ""),
        "models": first.models if first else [],
        "finished": "shards" in dataset,
        "funnel": counted,
        "samples": samples,
        "reasons": list(_reasons(out, manifests, counted)),
        "labels": [(name, rgb) for n, (name, rgb) in enumerate(LABEL_COLOURS.items()) if n in labels and n],
    }


def _dataset(out: AnyPath) -> dict[str, Any]:
    """dataset.json; empty where it was not copied along."""
    try:
        content = json.loads((out / DATASET).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptShardError(f"{DATASET}: cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


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
    pictures = [
        _photo(content, crops),
        Picture("face", data_uri(reduced(face, _CROP_PX))),
        Picture("mask", data_uri(masked(face, mask, _CROP_PX))),
        *(_crop(name, content["crops"][name], crops.get(name)) for name in ("portrait", "half")),
    ]
    text, url = _shortened(content["text"]), _shortened(content["url"])
    return Card(sample.key, text, url, _facts(content), pictures, frozenset(np.unique(mask).tolist()))


def _photo(content: dict[str, Any], crops: dict[str, Image]) -> Picture:
    """The whole photo, or the widest crop that there is, with box and points."""
    for name in ("full", "half", "portrait"):
        if name in crops:
            frame = content["crops"][name]["box"]
            drawn = marked(crops[name], _PHOTO_PX, frame, content["bbox"], content["kps"])
            title = "photo" if name == "full" else f"{name} (no full: {content['crops']['full']['absent']})"
            return Picture(title, data_uri(drawn))
    return Picture("photo", absent=content["crops"]["full"]["absent"])


def _crop(name: str, told: dict[str, Any], crop: Image | None) -> Picture:
    if crop is None:
        return Picture(name, absent=_shortened(told["absent"]))
    return Picture(f"{name} {crop.shape[1]} px", data_uri(reduced(crop, _CROP_PX)))


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
        yield Reason(name, _sentence(name), count, cards)


def _sentence(reason: str) -> str:
    return next((known.sentence for known in DropReason if known == reason), "")


def _drop_cards(out: AnyPath, manifests: list[Manifest], reason: str, *, pictured: bool) -> list[Card]:
    """A few rows that were dropped for a reason: from several shards, those with a picture first."""
    ranked: list[tuple[bool, int, Card]] = []
    for manifest in spread([manifest for manifest in manifests if manifest.dropped.get(reason)], _DROPS):
        thumbnails = _thumbnails(out, manifest.shard, reason) if pictured else {}
        for rank, record in enumerate(_examples(out, manifest.shard, reason, thumbnails)):
            card = _drop_card(record, thumbnails.get(record["key"]))
            ranked.append((not card.pictures, rank, card))
    ranked.sort(key=lambda entry: entry[:2])
    return [card for *_, card in ranked[:_DROPS]]


def _thumbnails(out: AnyPath, shard: str, reason: str) -> dict[str, bytes]:
    """Key -> JPEG of some dropped photos; none where the disposable file is gone or damaged."""
    try:
        table = storage.parquet(out / "drops" / f"{shard}.parquet").read(columns=["key", "verdict", "thumbnail"])
        return {row["key"]: row["thumbnail"] for row in table.to_pylist() if row["verdict"] == reason}
    except UNREADABLE:
        return {}


def _examples(out: AnyPath, shard: str, reason: str, thumbnails: dict[str, bytes]) -> list[dict[str, Any]]:
    """Ledger rows that were dropped for a reason, those with a thumbnail first."""
    rows = read_ledger(out, shard, _DROP_COLUMNS, reason)
    pictured = pc.is_in(rows["key"], pa.array(list(thumbnails), pa.string()))
    chosen = pa.concat_tables([rows.filter(pictured), rows.filter(pc.invert(pictured))]).slice(0, _DROPS)
    records: list[dict[str, Any]] = chosen.to_pylist()
    return records


def _drop_card(record: dict[str, Any], thumbnail: bytes | None) -> Card:
    card = Card(record["key"], "", _shortened(record["url"]), _facts(record))
    if thumbnail is not None:
        image = decode_jpeg(thumbnail)
        height, width = image.shape[:2]
        frame = (0, 0, record["width"] or width, record["height"] or height)
        card.pictures.append(Picture("", data_uri(marked(image, _DROP_PX, frame, record["bbox"], record["kps"]))))
    return card
