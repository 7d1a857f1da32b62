"""What a LAION-like row costs on this machine, by process and by stage, and whether scaling.py foretells its runs."""

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import faces
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import runs
import scaling
from material import Material
from server import serving

from pipeline.dataset.config import load_config
from pipeline.dataset.execute.make_shard import load
from pipeline.dataset.execute.runner import apply, apply_ahead
from pipeline.dataset.job import prepared
from pipeline.dataset.rows import Rows

ROWS_PER_FETCH = 30
"""Of laion2B-en's rows 3.3 % have 1,024 px on both sides."""


def laion_like(urls: Sequence[str]) -> pa.Table:
    """Metadata of these as large images, each followed by 29 small ones, which are not fetched."""
    sides = [1500, *[400] * (ROWS_PER_FETCH - 1)] * len(urls)
    others = (f"http://small.example/{n}" for n in count())
    listed = [next(others) if n else url for url in urls for n in range(ROWS_PER_FETCH)]
    return pa.table({"URL": listed, "TEXT": ["a person"] * len(listed), "WIDTH": sides, "HEIGHT": sides})


def third_dead(material: Material) -> list[str]:
    """Two web-like photos, then a dead link, and so on."""
    photos = sorted(path.name for path in material.web.iterdir())
    return [name for two in zip(photos[::2], photos[1::2], strict=True) for name in (*two, "gone")]


def on_ray(material: Material, workers: int, rows_per_shard: int, shards: int) -> runs.Cost:
    """Per fetched row between a quarter and three quarters of a run; the server's processor time too."""
    rows = rows_per_shard * shards
    sets = {"executor.name": "ray", "executor.workers": workers, "source.rows_per_shard": rows_per_shard}
    with serving(material.web) as (port, pid):
        server, urls = psutil.Process(pid), runs.urls(port, third_dead(material), rows)
        marks = shards // 4, shards * 3 // 4
        cost = runs.dataset(laion_like(urls), runs.words(material, sets), marks)
        times = server.cpu_times()
    cpu = Counter({kind: seconds / rows_per_shard for kind, seconds in cost.cpu.items()})
    cpu["server"] = (times.user + times.system) / rows
    return runs.Cost(cpu, cost.wall / rows_per_shard, cost.peak_mib)


def of_driver(material: Material) -> tuple[float, float]:
    """CPU seconds of the driver per fetched row and per shard; the photos and models do not matter to it."""
    small, large = 25, 150
    few, many = (on_ray(material, 1, rows, 16).cpu["driver"] for rows in (small, large))
    per_shard = (few - many) / (1 / small - 1 / large)
    return many - per_shard / large, per_shard


def of_metadata() -> float:
    """CPU seconds per fetched row to read and judge the rows of its metadata, which a thread of the driver does."""
    fetched = 20_000
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "part.parquet")
        pq.write_table(laion_like([f"http://large.example/{n}.jpg" for n in range(fetched)]), part)
        with prepared(str(part), load_config(None, [], shards=str(part)), dry_run=True) as job:
            start = time.process_time()
            assert sum(seeds.candidates for seeds in job.shards()) == fetched
            return (time.process_time() - start) / fetched


def check(material: Material, rounds: int) -> Iterator[dict[str, Any]]:
    """Time per row with one and two workers, simulated by the processes' CPU times with one, and measured."""
    counts, size = ((1,), (2, 8)) if material.smoke else ((1, 2), (50, 24))
    costs = {workers: [on_ray(material, workers, *size) for _ in range(rounds)] for workers in counts}
    cpu = Counter({kind: statistics.median(cost.cpu[kind] for cost in costs[1]) for kind in costs[1][0].cpu})
    for workers, of_workers in costs.items():
        times = 1000 * scaling.one_machine(cpu, workers), 1000 * statistics.median(cost.wall for cost in of_workers)
        shown = [f"{value:.4g} ms a row" for value in times]
        part = f"scaling: simulated against measured, workers: {workers}"
        ratio = round(times[0] / times[1], 3)
        yield {"part": part, "ours": shown[0], "peer": shown[1], "ratio": ratio, "wanted": "0.85 to 1.15"}


def by_stage(material: Material) -> Iterator[tuple[str, int, float]]:
    """Of each stage after the metadata: its name, the rows that come to it, milliseconds of CPU for each of these."""
    rows = 16 if material.smoke else 450
    with tempfile.TemporaryDirectory() as folder, runs.served(material.web, third_dead(material), rows) as urls:
        part = Path(folder, "part.parquet")
        pq.write_table(runs.plain(urls), part)
        config = load_config(None, runs.words(material, {})[1::2], shards=str(part), executor="local")
        with prepared(str(part), config) as job:
            download, *steps = load(job.plan, job.plan.steps[1:])
            (seeds,) = job.shards()
            fetched: list[Rows] = []
            batches = iter([Rows.living(seeds.table.drop_columns(["verdict", "stage"]))])
            spent = faces.cpu_s(lambda: fetched.extend(apply_ahead(download, batches, rows)))
            counts, costs = Counter({"download": rows}), Counter({"download": spent})
            left = fetched[0]
            while left.alive.num_rows:
                batch, left = left.split(min(faces.BATCH_ROWS, left.alive.num_rows))
                for step in steps:
                    counts[step.stage.name] += batch.alive.num_rows
                    spent_s = faces.clock()
                    start = spent_s()
                    batch = apply(step, batch)
                    costs[step.stage.name] += spent_s() - start
            download.stage.close()  # type: ignore[attr-defined]
    yield from ((name, counts[name], 1000 * costs[name] / max(1, counts[name])) for name in counts)
