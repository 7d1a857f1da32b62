"""Writes small datasets of drawn pictures through the real publisher; loaded by path, since tests import no tests."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.dataset.config import load_config
from pipeline.dataset.out.ledger import read_manifests, summary
from pipeline.dataset.out.output import Output, ShardWriter
from pipeline.dataset.plan import Plan, make_plan
from pipeline.dataset.rows import WITNESS_SCHEMA, Rows, tombstones
from schemas.columns import COLUMNS, LEDGER, LEDGER_SCHEMA, schema
from schemas.names import sample_key
from schemas.shard import encode_npy
from stages.pack import Pack
from stages.pixels.images import encode_jpeg, encode_png
from stages.runtime import Runtime
from stages.settings import Settings

BBOX, KPS = (
    [400.0, 200.0, 700.0, 600.0],
    [[480.0, 350.0], [620.0, 350.0], [550.0, 430.0], [490.0, 500.0], [610.0, 500.0]],
)
_PACK = Pack(Settings(), Runtime())
PAYLOAD = tuple(name for name in COLUMNS if name not in ("verdict", "stage"))


@cache
def plan() -> Plan:
    return make_plan(load_config(None, [], shards="sample"))


def drawn(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A gradient with a disc whose colour tells the seed."""
    x, y = np.arange(width), np.arange(height)[:, None]
    image = np.full((height, width, 3), 90, np.uint8)
    image[..., 0], image[..., 1] = x * 255 // width, y * 255 // height
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 4) ** 2
    image[disc] = (seed * 53 % 256, 200, seed * 97 % 256)
    return image


@cache
def _crops(seed: int) -> dict[str, bytes]:
    sizes = {"face": (224, 224), "portrait": (300, 300), "full": (640, 512)}
    return {name: encode_jpeg(drawn(*size, seed), 90) for name, size in sizes.items()}


_MASK = encode_png((np.arange(224)[:, None] * 19 // 224 + np.zeros((1, 224))).astype(np.uint8))
_DINO = encode_npy(np.ones((257, 2), np.float16))


@cache
def pictures(seed: int) -> dict[str, bytes]:
    """Crops of 24 kinds, and a person of its own."""
    arcface = np.random.default_rng(seed).normal(size=512).astype(np.float32)
    return {**_crops(seed % 24), "mask": _MASK, "arcface": encode_npy(arcface / np.linalg.norm(arcface)), "dino": _DINO}


CROPS = {
    "portrait": {"box": [250, 100, 850, 700], "size": [300, 300], "face_share": 0.5},
    "half": {"absent": "the photo is too small"},
    "full": {"box": [0, 0, 1280, 1024], "size": [640, 512], "face_share": 0.4},
}


def record(part: str, row: int, **changes: Any) -> dict[str, Any]:
    """A kept row with all its files; `changes` may replace any column."""
    known = {
        "key": sample_key(part, row),
        "part": part,
        "row": row,
        "url": f"http://photos.example/{part}/{row}.jpg",
        "text": f"caption of row {row}",
        "caption_chars": len(str(changes.get("text", f"caption of row {row}"))),
        "sha256": hashlib.sha256(b"%d" % row).hexdigest(),
        "n_bytes": 1000 + row,
        "format": "JPEG",
        "jpeg_quality": 90,
        "ai_mark": "",
        "width": 1280,
        "height": 1024,
        "n_faces": 1,
        "bbox": BBOX,
        "kps": KPS,
        "det_score": 0.87,
        "face_px": 300.0,
        "yaw_deg": 2.5,
        "pitch_deg": -4.0,
        "eye_px": 120.0,
        "second_score": 0.0,
        "sharpness": 1234.5678,
        "brightness": 100.0,
        "roll_deg": -1.5,
        "mask_share": 0.5,
        "occlusion": 0.25,
        "embedding_norm": 21.25,
        "punsafe": None,
        "pwatermark": None,
        "crops": json.dumps(CROPS),
        "crops_made": ["portrait", "full"],
        "targets": None,
        **pictures(row),
        **changes,
    }
    names = tuple(name for name in Pack.reads if name in known)
    (read,) = pa.Table.from_pylist([known], schema=schema(names)).to_pylist()  # as precise as the columns are
    packed = _PACK.row({**dict.fromkeys(Pack.reads), **read})
    return {**known, **packed, **{name: value for name, value in changes.items() if name == "json"}}


def dead(part: str, row: int, stage: str, verdict: str, image: bytes | None = None, **measured: Any) -> dict[str, Any]:
    """A dropped row; with `image` its picture goes to OUT/drops."""
    url = f"http://photos.example/{part}/{row}.jpg"
    fields = {"key": sample_key(part, row), "part": part, "row": row, "url": url, **measured}
    return {**fields, "stage": stage, "verdict": verdict, "image": image}


def rows(records: Sequence[Mapping[str, Any]]) -> Rows:
    fallen = [one for one in records if one.get("verdict")]
    ledger = [LEDGER_SCHEMA.empty_table()]
    for one in fallen:
        names = tuple(name for name in LEDGER if name in one and name not in ("verdict", "stage"))
        table = pa.Table.from_pylist([one], schema=schema(names))
        ledger.append(tombstones(table, pa.array([one["verdict"]], pa.string()), one["stage"]))
    witnesses = pa.Table.from_pylist([one for one in fallen if one["image"]], schema=WITNESS_SCHEMA)
    alive = pa.Table.from_pylist([one for one in records if not one.get("verdict")], schema=schema(PAYLOAD))
    return Rows(alive, pa.concat_tables(ledger), witnesses)


def write(out: Path, shards: Mapping[str, Sequence[Mapping[str, Any]]], *, finish: bool = True) -> Path:
    """Publish shards of `record` and `dead` rows; with `finish`, dataset.json says that the run came to its end."""
    output = Output(out)
    with output.prepared(plan()):
        for shard, records in shards.items():
            with ShardWriter(output, shard, plan()) as writer:
                writer.add(rows(records))
                writer.publish(len(records))
        if finish:
            output.describe(plan(), summary(read_manifests(out)))
    return out


@cache
def _photo() -> bytes:
    return encode_jpeg(drawn(1280, 1024), 90)


def mixed(part: str, start: int = 0) -> list[dict[str, Any]]:
    """Six rows: two kept, and drops before the download, at it, at the filter and behind it."""
    photo = _photo()
    face = {"n_faces": 1, "bbox": BBOX, "kps": KPS, "width": 1280, "height": 1024}
    return [
        record(part, start),
        dead(part, start + 1, "metadata", "unsafe"),
        dead(part, start + 2, "download", "not_found"),
        dead(part, start + 3, "filter", "small_face", photo, **face, face_px=90.0, second_score=0.1),
        record(part, start + 4),
        dead(part, start + 5, "segment", "empty_mask", **face, face_px=150.0, second_score=0.3),
    ]
