"""20,000 metadata rows through pre-filter and planning: `python benchmarks/bench_planning.py [ROWS]`. Target: < 5 s.

The rows are synthetic in LAION's schema; 3 % are large enough on both sides, as in laion2B-en.
"""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.execute.runner import judge_seeds
from pipeline.dataset.source.seeds import SourceSettings, find_parts, iter_shards
from stages.metadata import Metadata
from stages.runtime import Runtime
from stages.settings import Settings

LARGE = 0.03


def synthetic_part(rows: int) -> pa.Table:
    """A part in the schema of laion2B-en."""
    random = np.random.default_rng(0)
    large = random.random(rows) < LARGE
    return pa.table(
        {
            "URL": [f"https://cdn{n % 997}.example.com/images/2021/{n}_photo_large.jpg?w=1200" for n in range(rows)],
            "TEXT": [f"A caption of about sixty characters for image number {n}" for n in range(rows)],
            "WIDTH": np.where(large, random.integers(1024, 4000, rows), random.integers(50, 1023, rows)).astype("i4"),
            "HEIGHT": random.integers(1024, 2000, rows).astype("i4"),
            "similarity": random.random(rows),
            "pwatermark": random.random(rows).astype("f4") * 0.7,
            "punsafe": random.random(rows).astype("f4") * 0.3,
        }
    )


def plan(path: Path) -> tuple[int, int, int]:
    """Rows, candidates and shards of a part."""
    settings = SourceSettings()
    shards = rows = candidates = 0
    for part in find_parts(str(path), settings):
        for seeds in iter_shards(part, settings, partial(judge_seeds, Metadata(Settings(), Runtime()))):
            shards, rows, candidates = shards + 1, rows + seeds.table.num_rows, candidates + seeds.candidates
    return rows, candidates, shards


def main() -> None:
    """Print the seconds, and what came out."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "part.parquet")
        pq.write_table(synthetic_part(rows), path)
        start = time.perf_counter()
        seen, candidates, shards = plan(path)
        seconds = time.perf_counter() - start
    print(f"{seen} rows -> {candidates} candidates in {shards} shards: {seconds:.3f} s, {seen / seconds:,.0f} rows/s")


if __name__ == "__main__":
    main()
