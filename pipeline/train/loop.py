"""The training loop: `train` reads top to bottom."""

import torch
from accelerate import Accelerator

from pipeline.train import objective
from pipeline.train.base_model import Base
from pipeline.train.export import described, export
from pipeline.train.id_loss import id_loss_of
from pipeline.train.job import Job, precision
from pipeline.train.screen import console, say
from pipeline.train.session import Session
from pipeline.train.stop import StopSignal
from pipeline.train.validate.validation import Validator
from pipeline.train.watch import Watch
from schemas.errors import ExitCode


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
        say(f"note: {notice}")

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
        say(f"Stopped at step {session.step}; the same command with --resume goes on.")
    return ExitCode.OK if finished else ExitCode.INTERRUPTED


def _every(steps: int, step: int, done: bool) -> bool:
    return bool(steps) and (done or step % steps == 0)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _frozen_dtype(mixed_precision: str) -> torch.dtype:
    """The frozen base needs no more precision than it is computed in."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)
