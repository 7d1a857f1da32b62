"""The training loop: `train` reads top to bottom."""

import os
from datetime import timedelta
from itertools import chain

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, gather_object

from pipeline.shared.events import Hook
from pipeline.train.base_model import Base
from pipeline.train.export import described, export
from pipeline.train.job import TrainJob, hash_shards
from pipeline.train.run_folder import partly_done
from pipeline.train.run_page.run_page import page_of
from pipeline.train.session import Session
from pipeline.train.settings import OptimSettings
from pipeline.train.stop import StopSignal
from pipeline.train.validate.validation import Validator
from pipeline.train.watch import Watch, console, say, show, warn_once
from schemas.errors import ConfigError, ExitCode, OutputError, SourceError

FROZEN = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The frozen base needs no more precision than it is computed in."""
_SPLITTING = ("DEEPSPEED", "FSDP", "MEGATRON_LM")
"""What accelerate may be set up for that spreads weights over processes: each of these would save its part of them."""
_PATIENCE = timedelta(hours=2)
"""How long processes wait for another one: the main one may draw a large grid. By themselves they wait 10 minutes."""


def train(job: TrainJob) -> ExitCode:
    """Train until `steps`, saving checkpoints; one process of possibly several (see `accelerate launch`).

    Raises:
        UserError: before the first step, for what the call, the shards or the machine lack.
        CorruptShardError: for a sample that cannot be read; names shard and key.
    """
    config, run = job.config, job.run
    accelerator = make_accelerator(config.optim)
    is_main = accelerator.is_main_process
    base = Base(job.base, accelerator.device, FROZEN.get(accelerator.mixed_precision, torch.float32))
    validator = Validator(job, base) if is_main else None  # its judges take gigabytes
    hook = Hook(config.watch.hook, warn_once()) if config.watch.hook and is_main else None
    session, last = Session(job, accelerator, base), job.last_step
    require_agreement(accelerator, job, last)
    if is_main:
        description = described(job, session.model)
        run.check(description, resume=job.resume)
    hash_shards(job)  # last: a mistake of the call is not to be shown after hours
    accelerator.wait_for_everyone()
    if last:
        session.restore(last)
    for notice in session.loader.notices:
        say(f"note: {notice}")
    reading = iter(session.loader)
    first = next(reading)  # shards without a fitting sample leave no RUN behind
    accelerator.wait_for_everyone()
    if is_main:
        run.start(description, resume=job.resume)
    accelerator.wait_for_everyone()

    with (
        partly_done(),
        page_of(run, quiet=not is_main) as write_page,
        Watch(run.root, config, session.step, console, hook, quiet=not is_main) as watch,
        StopSignal() as stop,
    ):
        batches = watch.clock.timed(chain([first], reading))
        stopping = False
        while session.step < config.steps and not stopping:
            batch = next(batches)
            with accelerator.accumulate(session.forward):
                loss = session.loss(batch)
                accelerator.backward(loss)
                norm = session.optimizer_step()
            watch.batch(loss, samples=len(batch.keys) * accelerator.num_processes)
            if not accelerator.sync_gradients or session.step_was_skipped():
                continue

            lr = session.count_step()
            watch.step(session.step, lr=lr, grad_norm=norm, epoch=batch.position.epoch)
            stopping, done = stop.is_wanted(accelerator), session.step >= config.steps
            is_checkpoint = done or stopping or session.step % config.watch.save_every == 0
            if is_checkpoint:
                session.save()
                if is_main:
                    export(run, description, session.step, run.folder(session.step))
            is_due = validator is not None and validator.is_due(session.step, done)
            if validator is not None and is_due:
                with session.averaged_weights():
                    watch.note(session.step, validator.run(session.model, session.step))
            if (is_checkpoint or is_due) and not (done or stopping):  # at the end it is written anyway
                write_page()
        is_whole = session.step >= config.steps
        released = export(run, description, session.step, run.root) if is_main and is_whole else []

    # What averages the gradients must not outlive the process group: it would end gloo's threads while holding Python's
    # lock, for which one of them may wait (seen: a process that hung after its last step).
    del session.forward
    accelerator.free_memory()
    accelerator.end_training()
    if not is_whole:
        say(f"Stopped at step {session.step}; the same command with --resume goes on.")
        return ExitCode.INTERRUPTED
    for path in released:
        show(path)
    for note in description["sidecar"]["loading"] if is_main else ():
        say(note)
    return ExitCode.OK


def require_agreement(accelerator: Accelerator, job: TrainJob, last: int) -> None:
    """See that all processes go on from the same step, on the same data: each reads the disks of its own machine.

    Else each would train weights of its own, without a word.

    Raises:
        OutputError: when RUN is another folder for some of them.
        SourceError: when the dataset is.
    """
    seen = gather_object([(last, job.dataset.digest)])
    steps = dict.fromkeys(str(step or "none") for step, _ in seen)
    if len(steps) > 1:
        raise OutputError(
            f"{job.run.root} is not the same folder on all machines (step of the last checkpoint: {', '.join(steps)}): "
            "put --out on a disk that they share, or copy it to each of them."
        )
    if len({digest for _, digest in seen}) > 1:
        raise SourceError(
            f"{job.dataset.folders} is not the same on all machines: copy the dataset to each of them again."
        )


def make_accelerator(settings: OptimSettings) -> Accelerator:
    """This process's device, precision and peers.

    Raises:
        ConfigError: for a precision that the device cannot do, and a launcher that spreads weights over processes.
    """
    if splitting := [name for name in _SPLITTING if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"]:
        raise ConfigError(
            f"accelerate is set up for {splitting[0]}, which spreads weights over processes, and every process trains "
            "all of them here: start it by torchrun, or by accelerate launch --multi_gpu."
        )
    precision, has_gpu = settings.precision, torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if has_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if precision == "fp16" and not has_gpu:
        raise ConfigError(
            "optim.precision = fp16 needs a GPU, and torch has none here; use no (or bf16, slow on CPUs)."
        )
    return Accelerator(
        # Given as a number, accelerate would take a variable of the environment instead.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.accumulate),
        mixed_precision=precision,
        cpu=not has_gpu,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
