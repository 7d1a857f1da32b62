"""Run a plan in this process, one shard after the other."""

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager

from pipeline.plan import Plan
from pipeline.publish import Output
from pipeline.runner import Rows, apply_all
from pipeline.shard import Event, Finished, Worker, load, make_shard
from pipeline.source import Seeds
from schemas.errors import PlanError


@contextmanager
def started(plan: Plan) -> Iterator[None]:
    """Check that this process has the GPUs that the plan asks for.

    Raises:
        PlanError: when it has fewer.
    """
    wanted = plan.config.executor.gpus
    if wanted:
        import torch  # takes seconds, so only where it matters

        if torch.cuda.device_count() < wanted:
            raise PlanError(
                f"executor.gpus is {wanted}, but this process sees {torch.cuda.device_count()}: "
                "set it to 0, or install for the GPU (`make setup EXTRA=gpu`) on a machine that has one."
            )
    yield


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
