"""Run a plan in this process, one shard after the other."""

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from pipeline.dataset.execute.make_shard import Event, Execute, Finished, Worker, load_models, make_shard, windowed
from pipeline.dataset.execute.runner import apply_all
from pipeline.dataset.execute.watchdog import Watchdog, is_hanging
from pipeline.dataset.out.output import Output
from pipeline.dataset.plan import Plan
from pipeline.dataset.rows import Rows
from pipeline.dataset.source.seeds import Seeds
from schemas.errors import PlanError


@contextmanager
def started(plan: Plan) -> Iterator[Execute]:
    """Raises a PlanError when this process lacks the GPU that the plan asks for, or the plan asks for several."""
    wanted = plan.config.executor.gpus
    if wanted:
        import torch  # takes seconds, so only where it matters

        if torch.cuda.device_count() < wanted:
            raise PlanError(
                f"executor.gpus is {wanted}, but this process sees {torch.cuda.device_count()}: "
                "set it to 0, or install for the GPU (`make setup EXTRA=gpu`) on a machine that has one."
            )
    if wanted > 1:
        raise PlanError(f"executor.gpus is {wanted}, but the local executor is one process, and uses one: take ray.")
    yield run


def run(plan: Plan, shards: Iterable[Seeds], output: Output) -> Generator[Event, None, None]:
    """Make the shards; an unforeseen error fails its shard and leaves the others their turn."""
    desk = _Desk(plan)
    watchdog = Watchdog(plan.config.executor.shard_timeout_s, output.clear)
    try:
        for seeds in shards:
            try:
                with watchdog.watching(seeds.name):
                    for event in make_shard(plan, seeds, output, desk.worker, desk.compute):
                        watchdog.beat()
                        yield event
            except Exception as error:  # the shard's failure is reported, and the run ends with exit code 3
                yield Finished.failed(seeds.name, error)
                if is_hanging():
                    desk = _Desk(plan)  # the old one is left as it is: to close it could take for ever too
    finally:
        desk.close()


class _Desk:
    def __init__(self, plan: Plan) -> None:
        pool = plan.pool
        self.worker = Worker(plan)
        self._models = load_models(plan)
        self._threads = ThreadPoolExecutor(pool.threads) if pool.threads > 1 else None
        self._ahead = pool.threads

    def compute(self, batches: Iterator[Rows]) -> Iterator[Rows]:
        """The model steps over a shard's batches, on a GPU over several at a time."""
        threads = self._threads
        if threads is None:
            return (apply_all(self._models, rows) for rows in batches)
        begun = (threads.submit(apply_all, self._models, rows) for rows in batches)
        return windowed(begun, Future.result, self._ahead)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        self.worker.close()
