"""`python -m pipeline.train --from-shards [DIR …] --variant NAME`: train an adapter; `train` is the loop."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from rich.console import Console

from pipeline.adapters import VARIANTS
from pipeline.configfile import key_table
from pipeline.loader import worker_died
from pipeline.training import objective
from pipeline.training.base import Base
from pipeline.training.export import described, export, export_run
from pipeline.training.identity import id_loss_of
from pipeline.training.job import Call, Job, precision, prepared
from pipeline.training.session import Session
from pipeline.training.settings import TrainConfig
from pipeline.training.stop import StopSignal
from pipeline.training.validation import Validator
from pipeline.training.watch import Watch
from schemas.errors import CorruptShardError, ExitCode, FaceShardsError, UserError

console = Console()
errors = Console(stderr=True)


def train(job: Job) -> ExitCode:
    """Train until `steps`, with checkpoints on the way; one process of possibly several (see `accelerate launch`).

    Raises:
        UserError: before the first step, for what the call, the shards or the machine lack.
        CorruptShardError: for a sample that cannot be read; names shard and key.
    """
    config = job.config
    accelerator = Accelerator(
        gradient_accumulation_steps=config.optim.accumulate,
        mixed_precision=precision(config.optim.precision, _device()),
        cpu=_device().type == "cpu",
    )
    base = Base(job.base, accelerator.device, _frozen_dtype(accelerator.mixed_precision))
    id_loss = id_loss_of(config.objective, base)
    validator = Validator(job, base)
    session = Session(job, accelerator, base)
    told = described(job, session.model)
    if accelerator.is_main_process:
        job.run.start(told, resume=job.resume)
    accelerator.wait_for_everyone()
    if job.resume and job.run.steps():
        session.restore(job.run.steps()[-1])
    for notice in session.loader.reading.notices:
        _say(f"note: {notice}")

    watch = Watch(job.run.root, config, session.step, console, quiet=not accelerator.is_main_process)
    with watch, StopSignal() as stop:
        batches = watch.timed(session.loader)
        while session.step < config.steps:
            batch = next(batches)
            with accelerator.accumulate(session.forward):
                latents, text, condition, added = session.prepare(batch)
                noised = objective.noised(base.scheduler, latents, config.objective, session.generator)
                noise_pred = session.forward(noised.noisy_latents, noised.timesteps, text, condition, added)
                weights = objective.weights(base.scheduler, noised.timesteps, config.objective.min_snr_gamma)
                loss = objective.denoising_loss(noise_pred, noised, weights)
                if id_loss is not None:
                    loss = loss + id_loss(noise_pred, noised, latents, batch)
                accelerator.backward(loss)
                norm = session.clip()
                session.optimizer.step()
                session.optimizer.zero_grad(set_to_none=True)
            watch.batch(loss, samples=len(batch.keys) * accelerator.num_processes)
            if not accelerator.sync_gradients:
                continue

            lr = session.moved()
            watch.step(session.step, lr=lr, grad_norm=norm, epoch=batch.position.epoch)
            stopping, done = stop.heard(accelerator), session.step >= config.steps
            if done or stopping or session.step % config.watch.save_every == 0:
                session.save()
                if accelerator.is_main_process:
                    export(job.run, told, session.step, job.run.folder(session.step))
            if _every(config.watch.validate_every, session.step, done) and accelerator.is_main_process:
                with session.averaged():
                    watch.note(session.step, validator.run(session.model, session.step))
            if stopping:
                break

    finished = session.step >= config.steps
    if finished and accelerator.is_main_process:
        for path in export(job.run, told, session.step, job.run.root):
            console.print(str(path), highlight=False, soft_wrap=True)
    accelerator.end_training()
    if not finished:
        _say(f"Stopped at step {session.step}; the same command with --resume goes on.")
    return ExitCode.OK if finished else ExitCode.INTERRUPTED


def _every(steps: int, step: int, done: bool) -> bool:
    return bool(steps) and (done or step % steps == 0)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _frozen_dtype(mixed_precision: str) -> torch.dtype:
    """The frozen base needs no more precision than it is computed in."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
_COMMANDS = ("run", "export", "config")


@app.command()
def run(
    shards: Annotated[
        list[str] | None, typer.Argument(metavar="[DIR]...", help="OUTs of `dataset`; `out` if none.")
    ] = None,
    from_shards: Annotated[bool, typer.Option("--from-shards", help="Train from the shards in DIR.")] = False,
    name: Annotated[str, typer.Option("--variant", help=f"One of: {', '.join(VARIANTS)}.")] = "",
    base: Annotated[
        str | None,
        typer.Option(
            help="tiny, tiny-sdxl, sd15, sdxl, or a diffusers folder. (Default: sd15; tiny for `embedded` shards.)"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the run goes. (Default: runs/VARIANT-BASE.)")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps. (Default: by preset.)")] = None,
    preset: Annotated[str | None, typer.Option(help="tiny, sd15, sdxl-512 or sdxl-1024. (Default: by base.)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    image_encoder: Annotated[str | None, typer.Option(help="clip-vit-h or dinov2. (Default: clip-vit-h.)")] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="A released adapter to start from (.safetensors, .bin).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, noise, order and augmentation. (Default: 0.)")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="TOML file with the keys that --set takes.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="One config key, such as optim.lr=1e-5; `config` lists all.")
    ] = None,
) -> None:
    """Train an adapter from shards. Other commands: `export RUN` and `config`; each has its own --help."""
    adapter = {"image_encoder": image_encoder, "init_from": None if init_from is None else str(init_from)}
    told: dict[str, Any] = {
        "steps": steps,
        "seed": seed,
        "adapter": {key: value for key, value in adapter.items() if value is not None} or None,
    }
    call = Call(tuple(shards or ["out"]), name, base, out, preset, config, tuple(sets or ()), resume, told)
    job = prepared(call)
    for warning in job.warnings:
        _say(f"warning: {warning}")
    raise typer.Exit(train(job))


@app.command("export")
def export_command(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The --out of a training run.")],
    step: Annotated[int | None, typer.Option(help="The checkpoint. (Default: the last.)")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the files go. (Default: RUN.)")] = None,
) -> None:
    """Write the released files (.safetensors, .bin, LoRA, sidecar) of a checkpoint again."""
    for path in export_run(folder, step, out):
        console.print(str(path), highlight=False, soft_wrap=True)


@app.command("config")
def show_config() -> None:
    """List every config key with its default and explanation."""
    console.print(key_table(TrainConfig()))


def _say(text: str) -> None:
    """To stderr, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        errors.print(text, highlight=False, markup=False, soft_wrap=True)


def _arguments(given: list[str]) -> list[str]:
    """`--from-shards DIR …` as click understands it: a flag and arguments; training is what is done by default."""
    words = [word for item in given for word in (item.split("=", 1) if item.startswith("--from-shards=") else [item])]
    return words if words[:1] and words[0] in _COMMANDS else ["run", *words]


def main() -> None:
    """Run the command line, with the exit codes of schemas.errors."""
    try:
        app(_arguments(sys.argv[1:]))
    except (UserError, CorruptShardError) as error:
        _say(f"error: {error}")
        sys.exit(ExitCode.USER_ERROR)
    except FaceShardsError as error:
        _say(f"error: {error}")
        sys.exit(ExitCode.SHARDS_FAILED)
    except RuntimeError as error:
        if worker_died(error) is None:
            raise
        _say(f"error: {worker_died(error)}")
        sys.exit(ExitCode.SHARDS_FAILED)
    except KeyboardInterrupt:
        _say("Interrupted. Checkpoints are kept; the same command with --resume goes on.")
        sys.exit(ExitCode.INTERRUPTED)


if __name__ == "__main__":
    main()
