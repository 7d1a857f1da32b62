"""Random photos, and the ledger rows that the stages make of them under given thresholds; loaded by path."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import fake_dataset as fake
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.out.ledger import read_manifests, summary
from pipeline.dataset.out.output import Output
from schemas.columns import KEPT, LEDGER_SCHEMA
from schemas.names import sample_key
from stages.filter import QUALITIES, judge, poor
from stages.settings import FilterSettings

FACTOR = 4
LINE = [[480.0 + 30 * i, 350.0 + 30 * i] for i in range(5)]
SINGLE = lambda value: float(np.float32(value))  # noqa: E731 (stages read measurements from columns of float32)
FACE = ("n_faces", "bbox", "kps", "face_px", "second_score", "det_score")
AFTERWARDS = {
    "align": ("sharpness", "brightness"),
    "segment": ("occlusion",),
    "embed_face": ("embedding_norm", "fiqa"),
    "embed_image": ("photo", "aesthetic", "nsfw_score"),
}
"""Stage behind filter -> what it measures."""
LATEST = ("jpeg_quality", "ai_mark", "occlusion", "fiqa", "photo", "aesthetic", "nsfw_score")


def photo(rng: random.Random) -> dict:
    """All that could become known of a row, whatever the thresholds."""
    # Few values, on and beside the thresholds below, so that ties are frequent.
    size = lambda: rng.choice([600, 1000, 1001, *[1024, 1200, 3000] * 5])  # noqa: E731
    return {
        "old": rng.random() < 0.2,
        "meta_width": rng.choice([None, size()]),
        "meta_height": rng.choice([None, size()]),
        "metadata": rng.choice([None] * 24 + ["bad_url", "unsafe", "duplicate_url", "removed"]),
        "download": rng.choice([None] * 16 + ["not_found", "timeout"]),
        "early": rng.random() < 0.5,
        "width": size(),
        "height": size(),
        "size": rng.choice([None] * 16 + ["truncated_image", "not_an_image"]),
        "jpeg_quality": rng.choice([0, 50, 75, 76, 95, 100]),
        "ai_mark": rng.choice(["", "", "", "comfyui"]),
        "screen": rng.choice([None] * 12 + ["no_face"]),
        "detect": rng.choice([None] * 9 + ["corrupt_image"]),
        "n_faces": rng.choice([0, *[1] * 12, 2, None]),
        "bbox": fake.BBOX,
        "kps": rng.choice([fake.KPS, moved(rng), moved(rng), LINE]),
        "face_px": rng.choice([None, math.nan, 0.0, 31.5, *[32.0, 100.0, 128.0, SINGLE(199.99), 200.0, 500.0] * 3]),
        "second_score": rng.choice([None, math.nan, *[0.0, 0.125, SINGLE(0.3), SINGLE(0.4), 0.5] * 5]),
        "det_score": rng.choice([None, math.nan, *[0.5, SINGLE(0.7), 0.75, SINGLE(0.9)] * 5]),
        "sharpness": SINGLE(rng.choice([0, 25.2, 99.99, 100, rng.uniform(0, 300)])),
        "brightness": SINGLE(rng.choice([0, 15, 60, 127.5, 240, 255, rng.uniform(0, 255)])),
        "occlusion": SINGLE(rng.choice([0, 0.125, 0.3, 1, rng.uniform(0, 1)])),
        "segment": rng.choice([None] * 5 + ["empty_mask"]),
        "embed_face": rng.choice([None] * 3 + ["bad_embedding"]),
        "embedding_norm": SINGLE(rng.choice([5, 13.5, 16, rng.uniform(4, 30)])),
        **{name: SINGLE(rng.choice([0, 0.125, 0.5, rng.uniform(0, 1)])) for name in ("fiqa", "photo", "nsfw_score")},
        "aesthetic": SINGLE(rng.choice([-1, 0, 4.5, rng.uniform(0, 10)])),
    }


def truth(record: dict) -> dict:
    """A kept row as a photo."""
    names = ("meta_width", "meta_height", "metadata", "download", "early", "size", "screen", "detect", "old")
    nothing = dict.fromkeys(names)
    by_models = {"fiqa": 0.75, "photo": 0.9375, "aesthetic": 5.5, "nsfw_score": 0.0625}
    return {**nothing, "segment": None, "embed_face": None, **by_models, **record}


def moved(rng: random.Random) -> list[list[float]]:
    """A face that is turned somehow."""
    return [[x + SINGLE(rng.uniform(-60, 60)), y + SINGLE(rng.uniform(-60, 60))] for x, y in fake.KPS]


def some_qualities(rng: random.Random, share: float = 0.15) -> dict[str, float]:
    """A few of the thresholds that are off by default."""
    on = [quality for quality in QUALITIES if rng.random() < share]
    values = {"det_score": (0.5, 0.7, 0.8), "yaw": (5, 20, 40), "pitch": (5, 20, 40), "roll": (5, 20, 90)}
    values |= {"eye_px": (100, 140, 160), "jpeg_quality": (50, 76, 90), "ai_mark": (0,), "occlusion": (0, 0.125, 0.5)}
    values |= {"fiqa": (0.125, 0.5), "photo": (0.125, 0.5), "nsfw_score": (0, 0.125, 0.5), "aesthetic": (0.1, 4.5)}
    values |= {"sharpness": (25.2, 100, 250), "brightness": (15, 60, 127.5, 240), "embedding_norm": (13.5, 16, 20)}
    return {quality.key: rng.choice(values[quality.measure]) for quality in on}


def run(truth: dict, limits: FilterSettings) -> dict:
    """The ledger row that the stages make of a photo."""
    row = {name: truth[name] for name in ("meta_width", "meta_height")}
    small = min(truth["width"], truth["height"]) < limits.min_image_px
    claimed = [value for value in row.values() if value is not None]
    if truth["metadata"] not in (None, "duplicate_url"):
        return row | {"stage": "metadata", "verdict": truth["metadata"]}
    if min(claimed, default=math.inf) < limits.min_image_px:
        return row | {"stage": "metadata", "verdict": "small_image"}
    if truth["metadata"]:
        return row | {"stage": "metadata", "verdict": "duplicate_url"}
    if truth["download"]:
        return row | {"stage": "download", "verdict": truth["download"]}
    if truth["size"] == "not_an_image":
        return row | {"stage": "size", "verdict": "not_an_image"}
    row |= {name: truth[name] for name in ("width", "height")}
    if small:
        return row | {"stage": "download" if truth["early"] else "size", "verdict": "small_image"}
    if truth["width"] * truth["height"] > limits.max_pixels:
        return row | {"stage": "size", "verdict": "too_many_pixels"}
    for stage in ("size", "screen", "detect"):
        if truth[stage]:
            return row | {"stage": stage, "verdict": truth[stage]}
        row |= {name: truth[name] for name in ("jpeg_quality", "ai_mark")}
    row |= {name: truth[name] for name in FACE}
    if reason := judge(row, limits):
        return row | {"stage": "filter", "verdict": str(reason)}
    for stage, measures in AFTERWARDS.items():
        if truth.get(stage):
            return row | {"stage": stage, "verdict": truth[stage]}
        row |= {name: truth[name] for name in measures}
        if reason := poor(stage, row, limits):
            return row | {"stage": stage, "verdict": str(reason)}
    return row | {"stage": "pack", "verdict": KEPT}


def recorded(truth: dict, limits: FilterSettings) -> dict:
    """The row as its ledger has it: some are of a release that did not measure LATEST, nor judge by it."""
    row, on = run(truth, limits), {one.measure for one in QUALITIES if getattr(limits, one.key) != one.off}
    return {**row, **dict.fromkeys(LATEST)} if truth["old"] and not on & {*LATEST} else row


def write(out: Path, photos: list[dict]) -> Path:
    """An OUT whose ledgers hold these photos under the default thresholds; its one tar holds other samples."""
    fake.write(out, {"a-00000": [fake.record("a", row) for row in range(3)]})
    manifest = json.loads((out / "shards" / "a-00000.json").read_text())
    for number, start in enumerate(range(0, len(photos), 200)):
        shard = f"b-{number:05d}"
        rows = [
            recorded(truth, FilterSettings())
            | {"key": sample_key("b", row), "part": "b", "row": row, "url": "http://x/y"}
            for row, truth in enumerate(photos[start : start + 200], start)
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA), out / "shards" / f"{shard}.parquet")
        (out / "shards" / f"{shard}.tar").hardlink_to(out / "shards" / "a-00000.tar")
        dropped = Counter(row["verdict"] for row in rows)
        counted = {"rows_in": len(rows), "kept": dropped.pop(KEPT, 0), "dropped": manifest["dropped"] | dropped}
        (out / "shards" / f"{shard}.json").write_text(json.dumps(manifest | counted | {"shard": shard}))
    output = Output(out)
    output.describe(fake.plan(), summary(read_manifests(out)))
    dataset = json.loads((out / "dataset.json").read_text())
    dataset["plan"]["settings"]["models"]["screen"] = {"factor": FACTOR, "thresh": 0.1}
    (out / "dataset.json").write_text(json.dumps(dataset))
    return out
