"""Ray Data beside our use of Ray Core, for docs/decisions: the same stages on the same photos.

    FACESHARDS_DATA=folder python benchmarks/bench_ray_data.py --rows 400

Ray Data: `map_batches` for fetching (tasks) and for the models (a pool of two actors), Arrow batches of the same size.
It neither writes shards nor keeps a ledger, so its figures flatter it. CPU of all processes from the first result on.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
from bench_executors import _SERVER, Watch, settings, write_part

from pipeline.dataset.config import load_config
from pipeline.dataset.execute.make_shard import load
from pipeline.dataset.execute.runner import apply_all
from pipeline.dataset.job import executor_of, prepared
from pipeline.dataset.plan import Plan
from pipeline.dataset.rows import Rows
from schemas.columns import SEED


class Fetch:
    def __init__(self, plan: Plan) -> None:
        self._steps = load(plan, plan.at("fetch"))

    def __call__(self, table: pa.Table) -> pa.Table:
        return apply_all(self._steps, Rows.living(table)).alive


class Models:
    def __init__(self, plan: Plan) -> None:
        self._steps = load(plan, plan.at("models", "images"))

    def __call__(self, table: pa.Table) -> pa.Table:
        return apply_all(self._steps, Rows.living(table)).alive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    args = parser.parse_args()
    data = Path(os.environ["FACESHARDS_DATA"]).resolve()
    server = subprocess.Popen([sys.executable, "-c", _SERVER, str(data / "photos")], stdout=subprocess.PIPE, text=True)
    with tempfile.TemporaryDirectory() as folder:
        spec = str(Path(folder) / "part.parquet")
        write_part(data, int(server.stdout.readline()), args.rows, 1.0, Path(spec))
        config = load_config(None, settings(data, 2), shards=spec, executor="ray")
        with prepared(spec, config) as job, executor_of(config)[0](job.plan):
            try:
                measure(job.plan, pa.concat_tables([s.table for s in job.shards()]).select(SEED), server.pid)
            finally:
                server.kill()


def measure(plan: Plan, seeds: pa.Table, server: int) -> None:
    import ray  # after executor_of has set its token

    size = plan.config.executor.batch_rows
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    blocks = [seeds.slice(start, size).combine_chunks() for start in range(0, seeds.num_rows, size)]
    results = (
        ray.data.from_arrow(blocks)
        .map_batches(
            Fetch,
            fn_constructor_args=(plan,),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,
            compute=ray.data.ActorPoolStrategy(size=2),
        )
        .map_batches(
            Models,
            fn_constructor_args=(plan,),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0.5,
            compute=ray.data.ActorPoolStrategy(size=2),
        )
        .iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    )
    watch = Watch(server)
    watch.start()
    kept, mark = 0, None
    for batch in results:
        if mark is None:
            mark = (watch.sample(), time.monotonic())
        kept += batch.num_rows
    assert mark is not None
    spent, elapsed = watch.sample() - mark[0], time.monotonic() - mark[1]
    watch.stop = True
    rows = seeds.num_rows - size
    print(f"Ray Data: {kept} kept; {1000 * spent / rows:.1f} ms CPU per row, {rows / elapsed:.1f} rows/s")
    peaks = sorted(watch.peaks.values(), reverse=True)[:4]
    print("peak memory, MiB: " + "; ".join(f"{peak:.0f} {name.strip()}" for peak, name in peaks))


if __name__ == "__main__":
    main()
