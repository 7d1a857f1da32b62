"""The command line: `python -m pipeline dataset | plan | status | report | replay | quality | verify | forget | …`."""

import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline import models_command
from pipeline.dataset.execute.watchdog import LESS_GPU_MEMORY, is_hanging
from pipeline.options import AsJson, Folder, NewFolder, Profile, ProfileName, Sets, console, errors, say
from pipeline.shared.commands import ConfigFile, Interrupted, application
from pipeline.shared.process import NO_TELEMETRY, home, interrupt, on_interrupt, standard_streams, trouble_of_machine
from schemas.errors import CorruptShardError, ExitCode, LostError, ShardError, UserError, WeightsError
from schemas.names import SAMPLE

if TYPE_CHECKING:
    from pipeline.dataset.job import Job

# Each command imports what it needs: `--help`, and a mistake in a call, are answered at once.
app = application(
    no_args_is_help=True,
    help="Face-conditioned training shards, from lists of images on the web or from folders of your own.",
    epilog="Begin with `dataset`, which takes the bundled sample. Training: `python -m pipeline.train`; see docs/.",
)

Shards = Annotated[
    str,
    typer.Option(
        help="`sample`, `laion-part-0..99`, or paths, globs, URLs of metadata, tars or folders of images; "
        "comma-separated; `made:` before a word: its images were made by a model.",
        show_default=True,
    ),
]
Executor = Annotated[str | None, typer.Option("--executor", help="ray or local. (Default: ray; local for `sample`.)")]
RayAddress = Annotated[str | None, typer.Option("--ray-address", help="Join this Ray cluster.")]
With = Annotated[str | None, typer.Option("--with", help="Computed ahead for training: latents,text,mirror.")]
Out = Annotated[
    str, typer.Option("--out", help="Where the dataset goes: a folder, or a URL such as s3://bucket/faces.")
]


def for_job(command: Callable[..., None], *, dry_run: bool = False) -> Callable[..., None]:
    """Give a command the options that make a `Job`; it is called with this and with its own options."""

    def run(
        shards: Shards = SAMPLE,
        config: ConfigFile = None,
        sets: Sets = None,
        profile: Profile = None,
        executor: Executor = None,
        ray_address: RayAddress = None,
        extras: With = None,
        **own: Any,
    ) -> None:
        from pipeline.dataset.config import load_config
        from pipeline.dataset.job import prepared

        options = {"profile": profile, "executor": executor, "ray_address": ray_address, "extras": extras}
        values = load_config(config, sets or [], shards=shards, **options)
        with prepared(shards, values, dry_run=dry_run) as job:
            command(job, **own)

    # Typer reads the options from the signature.
    (shards, *shared, _), (_, out, *own) = (inspect.signature(one).parameters.values() for one in (run, command))
    run.__signature__ = inspect.Signature([shards, out, *shared, *own])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [shards, out, *shared, *own]}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


@app.command(epilog="Example: python -m pipeline dataset --shards photos --profile embedded --out faces")
@for_job
def dataset(
    job: "Job",
    out: Out = "out",
    replan: Annotated[
        bool, typer.Option("--replan", help="Go on in an OUT of another plan; its shards are removed.")
    ] = False,
    retry: Annotated[
        Literal["transient"] | None,
        typer.Option(
            help="transient: fetch again what failed for the network's or a server's trouble, once all is done."
        ),
    ] = None,
) -> None:
    """Make training shards; a rerun skips what is done."""
    from pipeline.dataset.finished.report import REPORT
    from pipeline.dataset.job import make_dataset
    from pipeline.shared.files import to_path

    folder = to_path(out)
    code = make_dataset(job, folder, console, replan=replan, retry=retry is not None)
    say(f"Shards: {folder / 'shards'}\nReport: {folder / REPORT}")
    if code is ExitCode.SHARDS_FAILED:
        errors.print(
            "Some shards failed, for the reasons above; the others are done. Unless a reason asks for another command, "
            "the same one goes on from there."
        )
    raise typer.Exit(code)


@app.command(epilog="Example: python -m pipeline plan --shards laion-part-0..9 --out faces --sample 500")
@partial(for_job, dry_run=True)
def plan(
    job: "Job",
    out: Out = "out",
    sample: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Run N rows for real, into nothing, and forecast the whole.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another draw of --sample.")] = 0,
    cost_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Of all that runs it, in your currency: forecasts the money.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what `dataset` would do, and what it lacks; write nothing.

    With --sample, N rows are drawn from all parts and run for real, for which
    weights and licences are needed: images, bytes, hours and costs of the whole
    follow, with ranges.
    """
    from pipeline.plan_command import show

    if cost_per_hour is not None and not sample:
        raise UserError("--cost-per-hour is for a forecast: give --sample N too.")
    try:
        show(job, out, sample, seed, cost_per_hour, as_json)
    except KeyboardInterrupt:
        errors.print("Interrupted. Nothing was written to OUT.")
        raise typer.Exit(ExitCode.INTERRUPTED) from None


@app.command(epilog="Example: python -m pipeline status faces")
def status(folder: Folder = "out", as_json: AsJson = False) -> None:
    """Tell how a run goes, from another terminal or machine."""
    from pipeline.dataset.finished.status import status as read
    from pipeline.dataset.finished.status import text_of
    from pipeline.shared.files import to_path

    now = read(to_path(folder))
    if as_json:
        typer.echo(json.dumps(now, indent=2))
    else:
        say(text_of(now, to_path(folder), time.time()))


@app.command(epilog="Example: python -m pipeline report faces")
def report(
    folder: Folder = "out",
    pictures: Annotated[bool, typer.Option(help="Show faces: some of what was kept and dropped.")] = True,
) -> None:
    """Write DIR/report.html: what was kept, dropped and measured."""
    from pipeline.dataset.finished.report import REPORT, write_report
    from pipeline.dataset.out.ledger import funnel_table
    from pipeline.shared.files import to_path

    counted = write_report(to_path(folder), pictures=pictures, shown_on=console)
    say(f"Report: {to_path(folder) / REPORT}")
    console.print(funnel_table(counted))


@app.command(epilog="Example: python -m pipeline replay faces --set filter.min_face_px=220")
def replay(folder: Folder = "out", config: ConfigFile = None, sets: Sets = None) -> None:
    """Count what other thresholds would keep, without an image."""
    from pipeline.dataset.finished import replay as finished
    from pipeline.shared.files import to_path

    for line in finished.lines(to_path(folder), config, sets or []):
        say(line)


@app.command(epilog="Example: python -m pipeline verify faces")
def verify(folder: Folder = "out") -> None:
    """Check manifests, hashes and counts, and decode every sample."""
    from pipeline.dataset.finished import verify as finished
    from pipeline.shared.files import to_path

    problems = finished.verify(to_path(folder), console)
    if foreign := finished.foreign_files(to_path(folder)):
        say(f"Not ours, and left alone: {', '.join(foreign)}")
    for problem in problems:
        say(f"{problem.file}{f' [{problem.key}]' if problem.key else ''}: {problem.message}", errors)
    if problems:
        errors.print(f"Problems found: {len(problems)}.")
        raise typer.Exit(ExitCode.SHARDS_FAILED)
    say(f"{folder}: {finished.good_news(to_path(folder))}")


@app.command(epilog="Example: python -m pipeline group faces --out grouped")
def group(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="The OUTs of runs.")],
    out: Annotated[str, typer.Option("--out", help="Where the new dataset goes: a folder, or a URL.")],
    similarity: Annotated[
        float, typer.Option(min=0.2, max=1, help="Least mean cosine of the ID vectors of one person.")
    ] = 0.48,
    singles: Annotated[
        bool, typer.Option("--singles/--no-singles", help="Keep photos of which no other shows the same person.")
    ] = True,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="About how many; persons stay whole.")] = 1000,
    sscd: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="SSCD's weights, by which copies that were edited are known too."),
    ] = None,
    replan: Annotated[
        bool, typer.Option("--replan", help="Go on in an OUT of another plan; its shards are removed.")
    ] = False,
) -> None:
    """Put photos of one person side by side, without near-copies.

    Each sample's json has `person`, a random number of this dataset alone. The same call goes on where it stopped.
    """
    from pipeline.dataset.finished.group.grouping import Wish
    from pipeline.dataset.finished.group.grouping import group as grouped
    from pipeline.dataset.out.ledger import funnel_table
    from pipeline.shared.files import to_path

    wish = Wish(similarity, singles, samples_per_shard, sscd)
    counted = grouped([to_path(one) for one in folders], to_path(out), wish, console, replan=replan)
    console.print(funnel_table(counted))


@app.command(epilog="Example: python -m pipeline quality grouped")
def quality(
    folder: Folder = "out",
    similarity: Annotated[float, typer.Option(min=-1, max=1, help="From which cosine on a pair is one person.")] = 0.48,
) -> None:
    """Tell which quality measure earns its place, after `group`.

    The worst photos by each measure are discarded, and errors of recognition counted in the rest.
    """
    from pipeline.dataset.finished import quality as finished
    from pipeline.shared.files import to_path

    for line in finished.lines(to_path(folder), similarity):
        say(line)


@app.command(epilog="Example: python -m pipeline forget faces --domain example.org --dry-run")
def forget(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The OUT of a run.")],
    urls: Annotated[list[str] | None, typer.Option("--url", help="The URL of an image, however it is written.")] = None,
    domains: Annotated[list[str] | None, typer.Option("--domain", help="A site, and all sites below it.")] = None,
    contents: Annotated[list[str] | None, typer.Option("--sha256", help="The sha256 of an image file.")] = None,
    files: Annotated[
        list[str] | None,
        typer.Option("--file", help="An image without a download: source_file, or PART/source_file (unless grouped)."),
    ] = None,
    lists: Annotated[
        list[str] | None, typer.Option("--list", metavar="FILE", help="A file, or its URL: URL, site or sha256 a line.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; write nothing.")] = False,
) -> None:
    """Take samples out for good; they are never fetched again.

    Rows are blanked. Without options, it goes on where it stopped. Options may be
    given several times. People cannot be searched for by face: a site, URL or
    file has to be named.
    """
    from pipeline.dataset.finished import forget as finished
    from pipeline.shared.files import to_path

    texts = [given or [] for given in (lists, urls, domains, contents, files)]
    gone = finished.forget(to_path(folder), *texts, dry_run=dry_run)
    for shard, keys in gone.rows.items() if dry_run else ():
        for key in keys:
            say(f"{shard}: {key}")
    if gone.rows:
        sentence = f"{'Would forget' if dry_run else 'Forgotten'}: {gone}."
    elif any(texts):
        later = "would" if dry_run else "will"
        sentence = f"Nothing in the dataset matches; later runs into it {later} not fetch it either."
    else:
        sentence = "Nothing is left to be done: to forget more, give --url, --domain, --sha256, --file or --list."
    say(sentence)
    for trouble in gone.damaged:
        say(f"error: {trouble}.", errors)
    if gone.damaged:
        raise typer.Exit(ExitCode.SHARDS_FAILED)


@app.command(epilog="Example: python -m pipeline push faces hf://datasets/OWNER/NAME")
def push(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The OUT of a run.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="hf://datasets/OWNER/NAME; made where it is not there.")],
    gated: Annotated[
        bool, typer.Option("--gated/--not-gated", help="Who wants to read it has to ask; you answer on its page.")
    ] = True,
    private: Annotated[bool, typer.Option("--private", help="Make it for the owner's eyes only.")] = False,
) -> None:
    """Publish DIR on the Hugging Face hub, gated.

    That is shards, ledgers, card and report, without any picture of dropped
    photos. The same call goes on where it stopped, and brings the copy to what
    DIR is now: after `forget`, what was taken out goes from its history too.
    """
    from pipeline.dataset.finished.hub import push as finished
    from pipeline.shared.files import to_path

    say(f"Published: {finished.push(to_path(folder), url, say, gated=gated, private=private)}")


@app.command("export-json", epilog="Example: python -m pipeline export-json faces --out list")
def export_json(
    target: NewFolder,
    folder: Folder = "out",
    crop: Annotated[
        Literal["portrait", "half", "full"],
        typer.Option(help="The image of an entry; where it is absent, the largest crop."),
    ] = "full",
    id_format: Annotated[
        Literal["npy", "pt-numpy"],
        typer.Option(help="npy: for numpy.load. pt-numpy: a pickled array for torch.load, as the FaceID script wants."),
    ] = "npy",
    absolute: Annotated[
        bool, typer.Option("--absolute", help="Absolute paths: the published FaceID script needs them for the IDs.")
    ] = False,
) -> None:
    """Write single files, and the list that other trainers read.

    The published FaceID script reads it with `--id-format pt-numpy --absolute`;
    from torch 2.6 on, set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 for that script.
    """
    from pipeline.dataset.finished import export_json as finished
    from pipeline.shared.files import to_path

    listed, left_out = finished.export_json(to_path(folder), target, crop, id_format, absolute=absolute)
    say(f"{target / finished.LIST}: {listed:,} samples")
    if left_out:
        say(f"{left_out:,} samples have no crop and were left out.")


@app.command(epilog="Example: python -m pipeline screen photos")
def screen(
    photos: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of photos, with and without faces.")],
    config: ConfigFile = None,
    sets: Sets = None,
    profile: ProfileName = None,
    margin: Annotated[float, typer.Option(help="Threshold / lowest score of a kept photo.", min=0.01, max=1)] = 0.6,
) -> None:
    """Fit models.screen_thresh on photos; show what it would miss."""
    from pipeline.dataset.config import load_config
    from pipeline.dataset.fit_screen import lines

    values = load_config(config, sets or [], shards=SAMPLE, profile=profile or "insightface", executor="local")
    for line in lines(photos, values, margin):
        say(line)


@app.command("config", epilog="Example: python -m pipeline config > my.toml")
def show_config() -> None:
    """List every config key, with its default and meaning."""
    from pipeline.dataset.config import Config
    from pipeline.shared.configfile import print_keys

    print_keys(Config())


app.add_typer(models_command.app, name="models")


def main() -> None:
    standard_streams()
    os.environ.update(NO_TELEMETRY | home())
    on_interrupt(interrupt)
    try:
        try:
            app()
        except UserError as error:
            say(f"error: {error}", errors)
            if isinstance(error, WeightsError) and error.details:
                say(f"\n{error.details}", errors)
            sys.exit(ExitCode.USER_ERROR)
        except (CorruptShardError, LostError, ShardError) as error:
            say(f"error: {error}{'; `verify` tells more.' if isinstance(error, CorruptShardError) else ''}", errors)
            sys.exit(ExitCode.SHARDS_FAILED)
        except (OSError, RuntimeError, MemoryError) as error:
            say(f"error: {trouble_of_machine(error, LESS_GPU_MEMORY)}", errors)
            sys.exit(ExitCode.SHARDS_FAILED)
        except (KeyboardInterrupt, Interrupted):
            errors.print("Interrupted. Finished shards are kept; the same command goes on.")
            sys.exit(ExitCode.INTERRUPTED)
    except SystemExit as end:
        on_interrupt(signal.SIG_DFL)  # whoever cannot wait for the end of all that was begun gets no traceback
        sys.stdout.flush()
        sys.stderr.flush()
        if is_hanging():  # the interpreter would wait for threads that never end
            os._exit(end.code if isinstance(end.code, int) else ExitCode.SHARDS_FAILED)
        raise


if __name__ == "__main__":
    main()
