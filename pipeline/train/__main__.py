"""The command line: `python -m pipeline.train --from-shards [DIR …] --variant NAME`, and the other commands.

The loop is in `pipeline.train.loop`.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from pipeline.shared.commands import ConfigFile, Interrupted, application, local_path
from pipeline.shared.process import home, large_imports, standard_streams, trouble_of_machine
from pipeline.train.adapters import NAMES, require_known
from schemas.errors import CorruptShardError, ExitCode, FaceShardsError, UserError, WeightsError, is_gpu_full

# Each command imports what it needs: torch takes a second and a half, and `--help` is answered at once.
app = application(help=__doc__)
_LESS_MEMORY = (
    "Set optim.gradient_checkpointing=true, with which --resume goes on too, or begin anew with a smaller "
    "data.batch_size."
)
_COMMANDS = ("run", "export", "evaluate", "report", "config")
Run = Annotated[Path, typer.Argument(parser=local_path, metavar="RUN", help="The --out of a training run.")]


@app.command(epilog="Example: python -m pipeline.train --from-shards faces --variant faceid-plusv2 --out adapter")
def run(
    shards: Annotated[
        list[str] | None, typer.Argument(metavar="[DIR]...", help="OUTs of `dataset`; `out` if none.")
    ] = None,
    from_shards: Annotated[bool, typer.Option("--from-shards", help="Train from the shards in DIR.")] = False,
    name: Annotated[str, typer.Option("--variant", help=f"One of: {', '.join(NAMES)}.")] = "",
    base: Annotated[
        str | None,
        typer.Option(
            help="tiny, tiny-sdxl, sd15, sdxl, or a diffusers folder. (Default: sd15; tiny for `embedded` shards.)"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(parser=local_path, metavar="DIR", help="Where the run goes. (Default: runs/VARIANT-BASE.)"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps. (Default: by preset.)")] = None,
    preset: Annotated[str | None, typer.Option(help="tiny, sd15, sdxl-512 or sdxl-1024. (Default: by base.)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    image_encoder: Annotated[str | None, typer.Option(help="clip-vit-h or dinov2. (Default: clip-vit-h.)")] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="A released adapter to start from (.safetensors, .bin).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, noise, order and augmentation. (Default: 0.)")] = None,
    config: ConfigFile = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="One config key, such as optim.lr=1e-5; `config` lists all.")
    ] = None,
) -> None:
    """Train an adapter from shards.

    Other commands: `export RUN`, `evaluate RUN|FILE`, `report RUN`, `config`; each has its own --help.
    """
    from pipeline.shared.bases import find_base
    from pipeline.train.settings import load_train_config

    adapter = {"image_encoder": image_encoder, "init_from": init_from and str(init_from)}
    options, pairs = {"steps": steps, "seed": seed, "adapter": adapter}, tuple(sets or ())
    # What is no variant, config or base is known before torch is imported, and before manifests are read, which may lie
    # far away.
    require_known(name)
    load_train_config(config, pairs, preset or "tiny", **options)
    if base:
        with suppress(WeightsError):
            find_base(base, sdxl=(preset or "").startswith("sdxl"))
    with large_imports():
        from pipeline.train.job import EMBEDDED, Call, prepared
        from pipeline.train.watch import say

    job = prepared(Call(tuple(shards or ["out"]), name, base, out, preset, config, pairs, resume, options))
    if EMBEDDED in job.dataset.profiles:
        say(
            "warning: these shards are of the `embedded` profile: its features stand in for a face recogniser and CLIP,"
            " and an adapter trained on them is for trying things out only."
        )
    # Imported once a call was proved: diffusers takes seconds to load, and a mistake is to be shown at once.
    with large_imports():
        from pipeline.train.loop import train

    raise typer.Exit(train(job))


@app.command("export", epilog="Example: python -m pipeline.train export adapter --step 2000")
def export_command(
    folder: Run,
    step: Annotated[int | None, typer.Option(help="The checkpoint. (Default: the last.)")] = None,
    out: Annotated[
        Path | None, typer.Option(parser=local_path, metavar="DIR", help="Where the files go. (Default: RUN.)")
    ] = None,
) -> None:
    """Write the released files (.safetensors, .bin, LoRA, sidecar) of a checkpoint again."""
    with large_imports():
        from pipeline.train.export import export_run
        from pipeline.train.watch import show

    for path in export_run(folder, step, out):
        show(path)


@app.command("report", epilog="Example: python -m pipeline.train report adapter")
def report_command(folder: Run) -> None:
    """Write RUN/report.html again: curves, validation grids by step, the recipe, how it went."""
    from pipeline.train.run_folder import RunFolder
    from pipeline.train.run_page.run_page import write_page
    from pipeline.train.watch import show

    show(write_page(RunFolder(folder)))


@app.command("evaluate", epilog="Example: python -m pipeline.train evaluate adapter --from-shards held-back")
def evaluate_command(
    subject: Annotated[
        Path,
        typer.Argument(parser=local_path, metavar="RUN|FILE", help="A run's --out, or a .safetensors or .bin file."),
    ],
    shards: Annotated[
        list[str] | None, typer.Argument(metavar="[DIR]...", help="Datasets of persons it was not trained on.")
    ] = None,
    from_shards: Annotated[
        bool, typer.Option("--from-shards", help="Take the persons from the shards in DIR.")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, a prompt on each line. (Default: watch.validate_prompts.)")
    ] = None,
    faces: Annotated[int, typer.Option(min=1, help="Persons.")] = 16,
    images: Annotated[int, typer.Option(min=1, help="Images of each person with each prompt.")] = 2,
    judge: Annotated[
        str | None,
        typer.Option(help="Folder of an insightface pack (watch.judge); another than the shards' is fairer."),
    ] = None,
    clip: Annotated[str | None, typer.Option(help="Folder of a whole CLIP (transformers' CLIPModel).")] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint of RUN. (Default: the last.)")] = None,
    name: Annotated[str, typer.Option("--variant", help="Of FILE, where neither sidecar nor name tells it.")] = "",
    base: Annotated[str | None, typer.Option(help="As in training. (Default: the one it was trained on.)")] = None,
    out: Annotated[
        Path | None, typer.Option(parser=local_path, metavar="DIR", help="(Default: RUN/evaluation, or beside FILE.)")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noise. (Default: that of the training.)")] = None,
    config: ConfigFile = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="One config key, such as watch.validate_steps=30.")
    ] = None,
) -> None:
    """Draw images of persons in DIR, and measure: whose face, copied or not, as the prompt says, how different."""
    from rich.table import Table

    if name:
        require_known(name)
    with large_imports():
        from pipeline.train.evaluate.call import Call, prepared

    options = {"seed": seed, "watch": {"judge": judge, "clip": clip}}
    folders = tuple(shards or ["out"])
    job = prepared(
        Call(subject, folders, name, base, step, out, prompts, faces, images, config, tuple(sets or ()), options)
    )
    with large_imports():  # once a call was proved, as in `run`
        from pipeline.train.evaluate.evaluation import evaluate
        from pipeline.train.evaluate.page import table
        from pipeline.train.watch import console, show

    if (written := evaluate(job)) is None:  # another process than the main one
        return
    folder, result = written
    seen = Table("measure", "mean", "95 % interval", "beside it", box=None, pad_edge=False)
    for line in table(result):
        seen.add_row(*line)
    if seen.row_count:
        console.print(seen)
    for path in ("evaluation.html", "evaluation.json"):
        show(folder / path)


@app.command("config", epilog="Example: python -m pipeline.train config > my.toml")
def show_config() -> None:
    """List every config key with its default and explanation."""
    from pipeline.shared.configfile import print_keys
    from pipeline.train.settings import TrainConfig

    print_keys(TrainConfig())


def _say(text: str, *, from_any_process: bool = False) -> None:
    """Once on each machine, since what one of them lacks the others may have."""
    from pipeline.train.watch import say

    say(text, from_any_process=from_any_process or os.environ.get("LOCAL_RANK", "0") == "0")


def main() -> None:
    standard_streams()
    os.environ.update(home())
    # `--from-shards DIR …` as click understands it: a flag and arguments; training is what is done by default.
    words: list[str] = []
    for item in sys.argv[1:]:
        words += item.split("=", 1) if item.startswith("--from-shards=") else [item]
    try:
        app(words if words and words[0] in _COMMANDS else ["run", *words])
    except UserError as error:
        _say(f"error: {error}")
        sys.exit(ExitCode.USER_ERROR)
    except CorruptShardError as error:
        _say(f"error: {error}", from_any_process=True)  # each process reads samples of its own
        sys.exit(ExitCode.USER_ERROR)
    except FaceShardsError as error:
        _say(f"error: {error}")
        sys.exit(ExitCode.SHARDS_FAILED)
    except (OSError, MemoryError) as error:
        _say(f"error: {trouble_of_machine(error, _LESS_MEMORY)}")
        sys.exit(ExitCode.SHARDS_FAILED)
    except RuntimeError as error:
        from pipeline.train.loader.loader import worker_died

        if is_gpu_full(error):
            _say(f"error: {trouble_of_machine(error, _LESS_MEMORY)}", from_any_process=True)
        elif worker_died(error) is None:
            raise
        else:
            _say(f"error: {worker_died(error)}")
        sys.exit(ExitCode.SHARDS_FAILED)
    except (KeyboardInterrupt, Interrupted):
        begins = (
            "the same command begins anew." if words[:1] == ["evaluate"] else "the same command with --resume goes on."
        )
        _say(f"Interrupted. Checkpoints are kept; {begins}")
        sys.exit(ExitCode.INTERRUPTED)


if __name__ == "__main__":
    main()
