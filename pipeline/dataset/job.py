"""`dataset` and `plan`: from SHARDS and a config to shards on disk, whoever executes."""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from rich.console import Console

from pipeline.dataset.config import Config
from pipeline.dataset.execute import local
from pipeline.dataset.execute.make_shard import METADATA, Event, Execute, Finished
from pipeline.dataset.execute.progress import RunScreen
from pipeline.dataset.execute.runner import judge_seeds
from pipeline.dataset.execute.watchers import Watchers
from pipeline.dataset.finished.forget import take_down_listed
from pipeline.dataset.finished.hub.card import write_card
from pipeline.dataset.finished.report import write_report
from pipeline.dataset.out.ledger import Funnel, funnel_table, read_manifests, shard_names, summary, why_nothing
from pipeline.dataset.out.lost import lost_errors
from pipeline.dataset.out.output import Output, by_part, refuse_surplus
from pipeline.dataset.out.retry import discard, second_chances
from pipeline.dataset.out.unconditional import write_unconditional
from pipeline.dataset.plan import Plan, make_plan
from pipeline.dataset.source.laion import OLD_LAION, is_old_laion
from pipeline.dataset.source.parts import Part, find_parts
from pipeline.dataset.source.sample import sample_server, write_sample
from pipeline.dataset.source.seeds import Captions, Seeds, iter_shards
from pipeline.shared.files import AnyPath, RemotePath, sizes
from pipeline.shared.several import ahead
from schemas.errors import ExitCode, LostError, OutputError, SourceError, UserError
from schemas.names import SAMPLE, fitting_name, shard_origin, split_kind, split_spec
from stages.runtime import Runtime


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

    @property
    def summary(self) -> str:
        """What starts, in a line."""
        rows = "" if self.rows is None else f" of {self.rows:,} rows"
        config, many = self.plan.config, "" if len(self.parts) == 1 else "s"
        return f"Starting {config.executor.name}: {len(self.parts):,} part{many}{rows}, profile {config.profile}."

    @property
    def notes(self) -> list[str]:
        """What the sources leave out, and what they should not be."""
        notes = [note for part in self.parts if part.pictures for note in part.pictures.named.notes]
        is_old = any(is_old_laion([part.origin], [part.name]) for part in self.parts)
        return [*notes, *([f"WARNING: {OLD_LAION}"] if is_old else [])]

    def refuse_as_out(self, out: AnyPath) -> None:
        """Raises an OutputError where OUT is a folder of images: from then on that would count as a dataset."""
        folders = [part.pictures.folder for part in self.parts if part.pictures]
        if os.path.realpath(str(out)) in map(os.path.realpath, folders):
            raise OutputError(f"OUT {out} is the folder of the images: give another, which may lie within it.")

    def shards(self) -> Iterator[Seeds]:
        """Seed rows of every shard, part after part."""
        return chain.from_iterable(self.shards_by_part())

    def shards_by_part(self) -> Iterator[Iterable[Seeds]]:
        metadata = self.plan.steps[0].stage()
        for part in self.parts:
            stage = metadata(self.plan.config, self.plan.runtime)  # one per part: it remembers the URLs before
            # Of a large part, rows that are never fetched are most of what the process of the run has to do.
            yield ahead(iter_shards(part, self.plan.config.source, partial(judge_seeds, stage)))


@contextmanager
def prepared(spec: str, config: Config, *, dry_run: bool = False) -> Iterator[Job]:
    """Prove the plan and find the parts; the bundled sample's server runs inside the block.

    In a dry run weights may be missing, and licences not accepted.

    Raises:
        UserError: for anything that the call, the config or the machine lacks; nothing was written.
    """
    words, runtime = [split_kind(word) for word in split_spec(spec)], Runtime()
    samples = [word for _, word in words].count(SAMPLE)
    if samples > 1:
        raise SourceError("SHARDS names sample twice: leave one out.")
    with ExitStack() as stack:
        if samples:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="faceshards-sample-")))
            metadata = str(write_sample(folder))
            words = [(kind, metadata if word == SAMPLE else word) for kind, word in words]
            runtime = replace(runtime, sample_port=stack.enter_context(sample_server(folder)))
        if not config.executor.ray_address:
            # A file without a name, in which the processes of this machine share what was refused.
            file = stack.enter_context(TemporaryFile())
            runtime = replace(runtime, refusals=f"/proc/{os.getpid()}/fd/{file.fileno()}")
        parts = find_parts(",".join(kind + word.replace(",", r"\,") for kind, word in words), config.source)
        plan = make_plan(config, runtime, dry_run=dry_run)
        suffixes = plan.suffixes
        yield Job(plan, tuple(replace(part, name=fitting_name(part.name, suffixes)) for part in parts))


def make_dataset(
    job: Job,
    out: AnyPath,
    console: Console,
    *,
    replan: bool = False,
    retry: bool = False,
    watch: Callable[[Event], None] | None = None,
) -> ExitCode:
    """Make all shards that are not done yet, then the summary and the report, whose funnel is shown.

    With `retry`, rows whose fetch failed for a reason that may have passed get another chance, once no shard failed.
    `watch` is called with all that happens.

    Raises:
        UserError: before anything is written.
        LostError: when OUT or the workers' node is lost meanwhile; finished shards are kept.
        CorruptShardError: when a finished shard is damaged.
    """
    plan, output = job.plan, Output(out)
    job.refuse_as_out(out)
    if isinstance(out, RemotePath) and out.url.startswith("memory:") and plan.config.executor.name == "ray":
        raise OutputError(f"OUT {out} exists in one process alone: give --executor local, or another OUT.")
    screen = RunScreen(console, job.rows)
    # OUT first: one that will not do is known at once.
    with Watchers(screen, out, plan.config.watch, watch) as watchers, output.prepared(plan, replan=replan):
        screen.say(job.summary)
        with screen, _Work(output, plan, screen, watchers, job.parts, output.sources).described() as work:
            gone = take_down_listed(output)
            if gone.rows:
                screen.say(f"download.removed: {gone}, are taken out of what is done.")
            for note in job.notes:
                screen.say(note)
            watchers.begin(parts=len(job.parts), input_rows=job.rows, plan_digest=plan.digest)
            # A shard that is made anew takes those along that gave its rows a second chance.
            further = [name for name in shard_names(out) if shard_origin(name)[1]]
            work.make(work.pending(job.shards_by_part(), further, whole=True))
            screen.say(str(work.captions))
            if retry and work.failed:
                screen.say("Some shards failed: second chances wait until all are done.")
            elif retry:
                again = second_chances(
                    job.parts, plan.config.source, out, partial(output.is_done, plan=plan), screen.expect
                )
                if not work.make(work.pending(again)) and not work.failed:
                    screen.say("Second chances: no row failed for a reason that may have passed.")
            output.sources = work.sources
            counted = _finish(output, plan)
            silent = counted.kept or (work.failed and not counted.rows_in)  # where all failed, that is known
            nothing = "" if silent else why_nothing(f"{counted.rows_in:,} rows", counted.dropped)
            code = ExitCode.SHARDS_FAILED if work.failed else ExitCode.OK
            watchers.end(
                rows=counted.rows_in, kept=counted.kept, dropped=counted.dropped, exit_code=code, nothing_kept=nothing
            )
    console.print(funnel_table(counted))
    if nothing:
        screen.say(nothing)
    return code


def _finish(output: Output, plan: Plan) -> Funnel:
    try:
        with lost_errors(output.root):
            counts = summary(read_manifests(output.root), output.root)
            files = write_unconditional(output.root, plan) if counts["kept"] else {}
            output.describe(plan, {**counts, "files": files})
            counted = write_report(output.root)
            write_card(output.root, counted)
            return counted
    except OutputError as error:
        raise LostError(f"The shards were made, but then: {error}") from error


@dataclass
class _Work:
    output: Output
    plan: Plan
    screen: RunScreen
    watchers: Watchers
    parts: Sequence[Part]
    earlier: Sequence[str]
    """The sources of earlier runs."""
    failed: list[str] = field(default_factory=list)
    captions: Captions = field(default_factory=Captions)
    made: set[str] = field(default_factory=set)
    """Parts of which this run made a shard."""
    same: set[str] = field(default_factory=set)
    """Parts of which a shard was done before, and that were not refused."""

    @property
    def sources(self) -> list[str]:
        """Those of OUT: a part that was refused, or of which no shard is there, is none of them."""
        given = (part.origin for part in self.parts if part.name in self.made | self.same)
        return sorted({*self.earlier, *given})

    @contextmanager
    def described(self) -> Iterator["_Work"]:
        """For `status`, from any terminal; when the run comes to its end, its counts stand in dataset.json."""
        planned = {"planned": {part.name: part.rows for part in self.parts}, "sources_before": self.earlier}
        # All that is given, so that a run that is killed leaves out none of which it made a shard.
        self.output.sources = sorted({*self.earlier, *(part.origin for part in self.parts)})
        self.output.describe(self.plan, planned)
        try:
            yield self
        except BaseException:
            # Not once there is a shard: to `status` the run begins when this is written. Nor before OUT has any: what
            # has no rows is of no source.
            with suppress(OSError, OutputError):  # of an OUT that is gone or read-only, which ended the run
                if not self.made | self.same and self.output.sources != self.sources and shard_names(self.output.root):
                    self.output.sources = self.sources
                    self.output.describe(self.plan, planned)
            raise

    def make(self, pending: Iterator[Seeds]) -> bool:
        """Whether there was any shard to be made: Ray and models, which take seconds to start, are so for the first.

        Raises:
            LostError: when none that comes after would fare better than the shard that failed.
        """
        first = next(pending, None)
        if first is None:
            return False
        with (
            executor_of(self.plan.config)(self.plan) as execute,
            closing(execute(self.plan, chain([first], pending), self.output)) as events,
        ):
            if not self.made and not self.failed:  # second chances are of the same run
                self.screen.begin()
            for event in events:
                self.watchers.take(event)
                if isinstance(event, Finished) and event.manifest is not None:
                    self.made.add(shard_origin(event.shard)[0])
                elif isinstance(event, Finished):
                    self.failed.append(event.shard)
                    if event.lost:
                        raise LostError(event.error)
        return True

    def pending(
        self, parts: Iterable[Iterable[Seeds]], further: Sequence[str] = (), *, whole: bool = False
    ) -> Iterator[Seeds]:
        """The shards that are not done; a part that turns out unreadable in the middle fails, and the others go on.

        Of `further`, the shards of second chances, those go that hold rows of a shard which is to be made. Where the
        parts are `whole`, finished shards to which they give no rows any more are refused.
        """
        listed = sizes(self.output.shards)
        surplus = by_part(listed if whole else ())
        for part, shards in zip(self.parts, parts, strict=True):
            try:
                for seeds in shards:
                    self.captions.add(seeds)
                    surplus[part.name].discard(seeds.name)
                    # What must not be used is marked after shards are cut, so that their borders stay.
                    seeds = replace(seeds, table=self.output.takedowns.judged(seeds.table))
                    with lost_errors(self.output.root):
                        done = self.output.is_done(seeds.name, self.plan, listed, seeds.table.num_rows)
                        if not done:
                            discard(self.output, further, seeds)
                    if done:
                        self.output.require_same_files(seeds.name, seeds.table)
                        self.same.add(part.name)
                        self.screen.done_before(seeds.table.num_rows)
                    else:
                        yield seeds
                refuse_surplus(surplus[part.name])
            except UserError as error:
                self.same.discard(part.name)
                self.watchers.take(Finished.failed(METADATA, error))
                self.failed.append(METADATA)


Start = Callable[[Plan], AbstractContextManager[Execute]]
_RAY_TOKEN = secrets.token_hex(32)
"""Of this process: other users of the machine cannot join its Ray, and no token file is left in the home folder."""


def executor_of(config: Config) -> Start:
    if config.executor.name == "local":
        return local.started
    if not config.executor.ray_address:
        # Ray remembers what it read when it was imported, perhaps by another.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=os.environ.get("RAY_AUTH_TOKEN") or _RAY_TOKEN)
    from pipeline.dataset.execute import cluster  # Ray takes seconds to import

    return cluster.started
