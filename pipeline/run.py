"""`dataset` and `plan`: from SHARDS and a config to shards on disk, whoever executes."""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from pipeline import local
from pipeline.config import Config
from pipeline.ledger import read_manifests, summary
from pipeline.plan import Plan, make_plan
from pipeline.progress import Screen
from pipeline.publish import Output
from pipeline.report import write_report
from pipeline.runner import judge_seeds
from pipeline.sample import SampleServer, write_sample
from pipeline.shard import Event, Finished
from pipeline.source import Part, Seeds, find_parts, iter_shards
from pipeline.unconditional import write_unconditional
from schemas.errors import ExitCode, UserError
from schemas.names import SAMPLE, split_spec


@dataclass(frozen=True)
class Job:
    """What a call of `dataset` or `plan` comes to."""

    plan: Plan
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int | None:
        """Input rows, where all parts tell cheaply."""
        known = [part.rows for part in self.parts]
        return None if None in known else sum(rows or 0 for rows in known)

    def shards(self) -> Iterator[Seeds]:
        """Seed rows of every shard, part after part."""
        metadata = self.plan.steps[0].stage_class()
        for part in self.parts:
            stage = metadata(self.plan.config)  # one per part: it remembers the URLs that it has seen
            yield from iter_shards(part, self.plan.config.source, partial(judge_seeds, stage))


@contextmanager
def prepared(spec: str, config: Config) -> Iterator[Job]:
    """Prove the plan and find the parts; the bundled sample's server runs inside the block.

    Raises:
        UserError: for anything that the call, the config or the machine lacks; nothing was written.
    """
    words = split_spec(spec)
    with _sample(config) if SAMPLE in words else nullcontext((config, Path())) as (config, sample):
        parts = find_parts(spec_with(words, sample), config.source)
        yield Job(make_plan(config), tuple(parts))


def spec_with(words: list[str], sample: Path) -> str:
    """SHARDS with the word `sample` replaced by the path of its written metadata."""
    return ",".join(str(sample) if word == SAMPLE else word for word in words)


@contextmanager
def _sample(config: Config) -> Iterator[tuple[Config, Path]]:
    """The bundled part, written to a temporary folder and served on loopback."""
    with TemporaryDirectory(prefix="faceshards-sample-") as folder:
        path = write_sample(Path(folder))
        with SampleServer(Path(folder)) as server:
            download = config.download.model_copy(update={"sample_port": server.port})
            yield config.model_copy(update={"download": download}), path


def make_dataset(job: Job, out: Path, console: Console, *, replan: bool = False) -> ExitCode:
    """Make all shards that are not done yet, then the summary and the report.

    Raises:
        UserError: before anything is written.
    """
    output = Output(out)
    start, execute = executor_of(job.plan.config)
    failed: list[str] = []
    with start(job.plan), output.prepared(job.plan, replan=replan), Screen(console, job.rows) as screen:
        for event in execute(job.plan, _pending(job, output, screen, failed), output):
            screen.show(event)
            if isinstance(event, Finished) and event.manifest is None:
                failed.append(event.shard)
        told = summary(read_manifests(out))
        files = write_unconditional(out, job.plan) if told["kept"] else {}
        output.describe(job.plan, {**told, "files": files})
    write_report(out)
    return ExitCode.SHARDS_FAILED if failed else ExitCode.OK


Execute = Callable[[Plan, Iterable[Seeds], Output], Iterator[Event]]


def executor_of(config: Config) -> tuple[Callable[[Plan], AbstractContextManager[Any]], Execute]:
    """What starts the config's executor, and what runs a plan on it."""
    if config.executor.name == "local":
        return local.started, local.run
    if not config.executor.ray_address:
        # Read when Ray is imported. A token of this run alone: other users of the machine cannot join its Ray, and no
        # token file is left in the home folder.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    from pipeline import cluster  # Ray takes seconds to import

    return cluster.started, cluster.run


def _pending(job: Job, output: Output, screen: Screen, failed: list[str]) -> Iterator[Seeds]:
    """The shards that are not done; a part that turns out unreadable half-way fails, and the rest goes on."""
    try:
        for seeds in job.shards():
            if output.is_done(seeds.name, job.plan):
                screen.skipped(seeds.name, seeds.table.num_rows)
            else:
                yield seeds
    except UserError as error:
        screen.show(Finished.failed("metadata", error))
        failed.append("metadata")
