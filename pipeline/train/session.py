"""All that changes while a run goes, into a checkpoint and back."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel

from pipeline.train import objective, optim
from pipeline.train.adapters.model import AdapterModel
from pipeline.train.adapters.released import read_released, require_fit
from pipeline.train.base_model import Base
from pipeline.train.id_loss import id_loss_of
from pipeline.train.inputs import Preparer
from pipeline.train.job import TrainJob
from pipeline.train.loader.batches import Batch
from pipeline.train.loader.loader import ShardLoader
from pipeline.train.watch import say
from schemas.errors import ConfigError, FaceShardsError

_WORTH_COMPILING = 200_000
"""Samples of a process from which compiling is won back three times: it takes some 100 s, and saves 1.6 ms of each."""
_DIVERGED = "the {} are not finite, the training diverged: go back to an earlier checkpoint with a lower optim.lr"
_MOST_SKIPPED = 100
"""Optimiser steps in a row that the fp16 scaler may skip: it begins at 2^16 and halves its scale at each."""


class Session:
    """Model, optimiser, averages, data order and random states of one process."""

    def __init__(self, job: TrainJob, accelerator: Accelerator, base: Base) -> None:
        """Everything at step 0; `base` is loaded on the accelerator's device."""
        config, rank, on_gpu = job.config, accelerator.process_index, accelerator.device.type == "cuda"
        self._accelerator, self._job, self._scheduler = accelerator, job, base.scheduler
        self._id_loss = id_loss_of(config.objective, base)
        self.step = 0
        self._samples = config.optim.accumulate * config.data.batch_size * accelerator.num_processes  # of a step
        self._skipped = 0
        self.loader = ShardLoader(
            job.dataset,
            job.variant.reads,
            config,
            rank=rank,
            world=accelerator.num_processes,
            base=job.base.folder,
            faces=job.variant.faces,
            pin_memory=on_gpu,
        )
        # The same adapter on every process, another noise on each.
        torch.manual_seed(config.seed)
        self.model = _model(job, base, has_buckets=config.data.buckets or self.loader.reading.latents)
        self.trained = self.model.trained()
        parameters = list(self.trained.values())
        decay = config.optim.ema_decay
        self.average: Any | None = EMAModel(parameters, decay=decay, foreach=on_gpu) if decay else None
        optimizer = optim.optimizer(parameters, config.optim)
        self.schedule = optim.schedule(optimizer, config.optim, config.steps)
        torch.manual_seed(config.seed + 1 + rank)
        self.generator = torch.Generator().manual_seed(config.seed + 1 + rank)
        self.forward, self.optimizer = accelerator.prepare(self.model, optimizer)
        self._prepare = Preparer(base, self.generator)

    def loss(self, batch: Batch) -> torch.Tensor:
        """The loss of a batch, a scalar: of noise that is drawn for it, and the ID loss where that is on."""
        settings = self._job.config.objective
        latents, text, condition, added = self._prepare(batch)
        noised = objective.noised(self._scheduler, latents, settings, self.generator)
        noise_pred = self.forward(noised.noisy_latents, noised.timesteps, text, condition, added)
        weights = objective.weights(self._scheduler, noised.timesteps, settings.min_snr_gamma)
        in_latents = objective.face_weights(batch.kps, latents, settings.face_weight)
        loss = objective.denoising_loss(noise_pred, noised, weights, in_latents)
        return loss if self._id_loss is None else loss + self._id_loss(noise_pred, noised, latents, batch)

    def optimizer_step(self) -> torch.Tensor | None:
        """Clip the gradient, go down it, clear it; nothing while batches are accumulated.

        Returns:
            The gradient's norm before, where it is clipped.
        """
        norm, limit = None, self._job.config.optim.max_grad_norm
        if limit and self._accelerator.sync_gradients:
            norm = self._accelerator.clip_grad_norm_(self.trained.values(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def step_was_skipped(self) -> bool:
        """Whether the fp16 scaler left the optimiser step out, as a gradient was too large for its scale.

        Raises:
            FaceShardsError: when no scale is small enough.
        """
        self._skipped = self._skipped + 1 if self._accelerator.optimizer_step_was_skipped else 0
        if self._skipped >= _MOST_SKIPPED:
            raise FaceShardsError(_DIVERGED.format(f"gradients after step {self.step}"))
        return self._skipped > 0

    def count_step(self) -> float:
        """After an optimiser step: move schedule and average on; returns the learning rate of the step."""
        lr = float(self.schedule.get_last_lr()[0])
        self.step += 1
        self.schedule.step()
        if self.average is not None:
            self.average.step(self.trained.values())
        return lr

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model with its averaged weights, where there are any."""
        if self.average is None:
            yield
            return
        parameters = list(self.trained.values())
        self.average.store(parameters)
        self.average.copy_to(parameters)
        try:
            yield
        finally:
            self.average.restore(parameters)

    def save(self) -> None:
        """Write a checkpoint; every process takes part, the main one writes.

        Raises:
            FaceShardsError: when a weight is no longer finite; earlier checkpoints stay.
        """
        if not all(torch.isfinite(weight).all() for weight in self.trained.values()):
            raise FaceShardsError(_DIVERGED.format(f"weights at step {self.step}"))
        device = self._accelerator.device
        mine = {
            "torch": torch.get_rng_state(),
            "generator": self.generator.get_state(),
            "loader": self.loader.state_dict(),
        }
        if device.type == "cuda":
            mine["cuda"] = torch.cuda.get_rng_state(device)
        ranks = gather_object([mine])
        if self._accelerator.is_main_process:
            average, counters = None, None
            if self.average is not None:
                average = dict(zip(self.trained, self.average.shadow_params, strict=True))
                # The averaged weights lie in a file of their own.
                counters = {key: value for key, value in self.average.state_dict().items() if key != "shadow_params"}
            state = {
                "step": self.step,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "average": counters,
                "scaler": None if self._accelerator.scaler is None else self._accelerator.scaler.state_dict(),
                "ranks": ranks,
                "samples": self._samples,
            }
            self._job.run.save(self.step, self.trained, average, state, self._job.config.watch.keep)
        self._accelerator.wait_for_everyone()

    def restore(self, step: int) -> None:
        """Go back to a checkpoint, random states and data order included.

        Of another number of processes, noise is drawn anew from here on, and the next epoch begins.

        Raises:
            OutputError: when it is damaged.
        """
        weights, average, state = self._job.run.load(step)
        accelerator, ranks = self._accelerator, state["ranks"]
        self.model.load_trained(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None and average is not None:
            self.average.load_state_dict({**state["average"], "shadow_params": [average[key] for key in self.trained]})
            self.average.to(accelerator.device)
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        self.step = step
        before = state.get("samples", self._samples // accelerator.num_processes * len(ranks))
        if before != self._samples:
            say(
                f"note: a step had {before} samples and has {self._samples}, by the number of processes and "
                "optim.accumulate, which may be changed so that it has as many as before."
            )
        if len(ranks) != accelerator.num_processes:
            self.loader.load_states_of([one["loader"] for one in ranks])
            # From seeds of this step: those of the beginning would give its noise once more.
            sequence = np.random.SeedSequence([self._job.config.seed, step, accelerator.process_index])
            drawn, dropped = sequence.generate_state(2).tolist()
            self.generator.manual_seed(drawn)
            torch.manual_seed(dropped)
            say(f"note: the number of processes was {len(ranks)} and is {accelerator.num_processes}.")
            return
        mine = ranks[accelerator.process_index]
        self.loader.load_state_dict(mine["loader"])
        torch.set_rng_state(mine["torch"])
        self.generator.set_state(mine["generator"])
        if "cuda" in mine and accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(mine["cuda"], accelerator.device)


def _model(job: TrainJob, base: Base, *, has_buckets: bool) -> AdapterModel:
    """The adapter in its base, from scratch or from a released file, ready to train.

    `has_buckets` is whether `full` targets have several shapes.
    """
    adapter, settings = job.config.adapter, job.config.optim
    model = AdapterModel(base.unet, job.variant, job.widths, adapter)
    if adapter.init_from and not job.last_step:
        tensors = read_released(Path(adapter.init_from))
        require_fit(Path(adapter.init_from), tensors, model.trained(), job.variant.name)
        model.load_trained(tensors)
    model.to(base.device)
    model.train()
    if settings.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    is_compiled, on_gpu = settings.compile, base.device.type == "cuda"
    # Triton has a C compiler build what launches its kernels.
    has_gcc = bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
    can_compile = has_gcc and find_spec("triton") is not None
    if is_compiled == "auto":
        data = job.config.data
        samples = job.config.steps * settings.accumulate * data.batch_size
        has_one_shape = not (has_buckets and data.crops.full) and not (data.pairs and job.variant.faces > 1)
        is_worth_it = samples >= _WORTH_COMPILING and has_one_shape
        is_compiled = on_gpu and is_worth_it and can_compile
        if on_gpu and is_worth_it and not can_compile:
            say("note: not compiled, with which a step is 1.3 times as fast: that needs triton and gcc.")
    elif is_compiled and on_gpu and not can_compile:
        raise ConfigError("optim.compile needs triton and a C compiler here: install gcc, or set it to false.")
    if is_compiled:
        model.compile_predict(job.config.data.batch_size)
    elif settings.channels_last:
        base.unet.to(memory_format=torch.channels_last)
    return model
