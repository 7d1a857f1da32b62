"""A dataset of many rows, of whose ledgers all is drawn: to try what its report costs.

python benchmarks/many_rows.py 1000000 OUT        # leaves it there, for `report` and a browser
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

import fake_dataset as fake

from pipeline.dataset.out.ledger import read_manifests, summary
from pipeline.dataset.out.output import Output
from schemas.columns import KEPT, LEDGER_SCHEMA
from stages import STAGES

SHARD_ROWS = 10_000
FUNNEL = {
    ("metadata", "small_image"): 0.45, ("metadata", "duplicate_url"): 0.05, ("metadata", "unsafe"): 0.05,
    ("download", "not_found"): 0.07, ("download", "timeout"): 0.04, ("download", "dns_error"): 0.04,
    ("size", "truncated_image"): 0.01, ("screen", "no_face"): 0.09, ("filter", "no_face"): 0.05,
    ("filter", "several_faces"): 0.06, ("filter", "small_face"): 0.05, ("segment", "empty_mask"): 0.005,
    ("pack", KEPT): 0.035,
}  # fmt: skip
"""Stage and verdict -> share of the rows."""


def ledger(rng: np.random.Generator, first: int, rows: int) -> pa.Table:
    """Rows as a run leaves them: what a stage measures is null for those that did not come so far."""
    stages, verdicts = (np.array(words) for words in zip(*FUNNEL, strict=True))
    drawn = rng.choice(len(FUNNEL), rows, p=list(FUNNEL.values()))
    stage, verdict, numbers = stages[drawn], verdicts[drawn], np.arange(first, first + rows)
    side = np.exp(rng.normal(7.2, 0.5, rows)).clip(1024, 9000) // np.where(verdict == "small_image", 3, 1)
    face = np.where(verdict == "small_face", rng.uniform(8, 127, rows), np.exp(rng.normal(5.6, 0.7, rows)).clip(128))
    corner, points = rng.uniform(0, 500, (rows, 1, 2)), np.array(fake.KPS) + rng.normal(0, 12, (rows, 5, 2))
    hosts = rng.zipf(1.3, rows) % 100_000
    known: dict[str, dict[str, Any]] = {
        "metadata": {
            "key": [f"p-{number:09d}" for number in numbers],
            "part": ["p"] * rows,
            "row": numbers,
            "url": [f"https://host{host}.example/{number}.jpg" for host, number in zip(hosts, numbers, strict=True)],
            "caption_chars": rng.integers(0, 200, rows),
            "meta_width": side,
            "meta_height": side * 3 // 2,
            "verdict": verdict,
            "stage": stage,
        },
        "screen": {"width": side, "height": side * 3 // 2},
        "filter": {
            "n_faces": np.select([verdict == "no_face", verdict == "several_faces"], [0, 2], 1),
            "bbox": np.hstack([corner[:, 0], corner[:, 0] + face[:, None] * [1, 1.3]]),
            "kps": corner + points / 300 * face[:, None, None],
            "det_score": rng.beta(9, 3, rows),
            "face_px": face,
            "second_score": np.where(rng.random(rows) < 0.7, 0, rng.uniform(0, 0.4, rows)),
        },
        "segment": {
            "sharpness": np.exp(rng.normal(5, 1, rows)),
            "brightness": rng.normal(120, 30, rows).clip(0, 255),
            "mask_share": rng.uniform(0.2, 0.8, rows),
        },
        "pack": {
            "crops_made": [["full", "portrait", "half"][: 1 + number % 3] for number in numbers],
            "embedding_norm": rng.normal(22, 3, rows),
        },
    }
    order, columns = list(STAGES), {name: pa.nulls(rows, kind) for name, kind in fields()}
    came = np.array([order.index(name) for name in stage])
    for name, measures in known.items():
        at = pa.array(np.arange(rows), mask=came < order.index(name))
        for column, values in measures.items():
            kind = LEDGER_SCHEMA.field(column).type
            exact = np.asarray(values).astype(np.int64) if pa.types.is_integer(kind) else values
            columns[column] = pa.array(exact if isinstance(exact, list) else exact.tolist(), kind).take(at)
    return pa.table(columns, schema=LEDGER_SCHEMA)


def fields() -> Iterator[tuple[str, pa.DataType]]:
    return ((field.name, field.type) for field in LEDGER_SCHEMA)


def write(out: Path, rows: int) -> None:
    """A dataset of so many rows; all its tars are one of 30 samples."""
    fake.write(out, {"p-00000": [fake.record("p", row, **fake.pictures(row % 5)) for row in range(30)]})
    folder, rng = out / "shards", np.random.default_rng(0)
    manifest = json.loads((folder / "p-00000.json").read_text())
    for number, first in enumerate(range(0, rows, SHARD_ROWS)):
        shard, table = f"p-{number:05d}", ledger(rng, first, min(SHARD_ROWS, rows - first))
        if number:
            (folder / f"{shard}.tar").hardlink_to(folder / "p-00000.tar")
        pq.write_table(table, folder / f"{shard}.parquet")
        dropped = Counter(table["verdict"].to_pylist())
        counted = {"rows_in": table.num_rows, "kept": dropped.pop(KEPT, 0), "dropped": manifest["dropped"] | dropped}
        (folder / f"{shard}.json").write_text(json.dumps(manifest | counted | {"shard": shard}))
    Output(out).describe(fake.plan(), summary(read_manifests(out)))


if __name__ == "__main__":
    write(Path(sys.argv[2]), int(sys.argv[1]))
