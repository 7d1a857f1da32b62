"""Run a plan in this process, one shard after the other."""

from collections.abc import Iterable, Iterator
from contextlib import closing

from pipeline.plan import Plan
from pipeline.publish import Output
from pipeline.runner import Rows, apply_all
from pipeline.shard import Event, Finished, Worker, load, make_shard
from pipeline.source import Seeds


def run(plan: Plan, shards: Iterable[Seeds], output: Output) -> Iterator[Event]:
    """Make the shards; an unforeseen error fails its shard and leaves the others their turn."""
    worker = Worker(plan)
    models = load(plan, plan.at("models", "images"))

    def compute(batches: Iterator[Rows]) -> Iterator[Rows]:
        return (apply_all(models, rows) for rows in batches)

    with closing(worker):
        for seeds in shards:
            try:
                yield from make_shard(plan, seeds, output, worker, compute)
            except Exception as error:  # the shard's failure is reported, and the run ends with exit code 3
                yield Finished.failed(seeds.name, error)
