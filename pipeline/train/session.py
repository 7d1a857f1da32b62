"""All that changes while a run goes, and its way into a checkpoint and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from pipeline.train import optim
from pipeline.train.adapters.model import AdapterModel
from pipeline.train.adapters.released import read_released, require_fit
from pipeline.train.base_model import Base
from pipeline.train.inputs import Preparer
from pipeline.train.job import Job
from pipeline.train.loader import ShardLoader
from schemas.errors import FaceShardsError, OutputError


class Session:
    """Model, optimiser, averages, data order and random states of one process."""

    def __init__(self, job: Job, accelerator: Accelerator, base: Base) -> None:
        """Everything at step 0; `base` is loaded on the accelerator's device."""
        config = job.config
        self._accelerator = accelerator
        self._job = job
        self.step = 0
        # The same adapter on every process, another noise on each.
        torch.manual_seed(config.seed)
        self.model = _model(job, base)
        self.trained = self.model.trained()
        parameters = list(self.trained.values())
        self.average = optim.moving_average(parameters, config.optim)
        optimizer = optim.optimizer(parameters, config.optim)
        self.schedule = optim.schedule(optimizer, config.optim, config.steps)
        torch.manual_seed(config.seed + 1 + accelerator.process_index)
        self.generator = torch.Generator().manual_seed(config.seed + 1 + accelerator.process_index)
        self.forward, self.optimizer = accelerator.prepare(self.model, optimizer)
        self.loader = self._make_loader(None)
        self.prepare = Preparer(base, self.generator)

    def _make_loader(self, state: dict[str, Any] | None) -> ShardLoader:
        job, accelerator = self._job, self._accelerator
        return ShardLoader(
            job.dataset,
            job.variant.reads,
            job.config,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            state=state,
            base=job.base.folder,
            pin_memory=accelerator.device.type == "cuda",
        )

    def clip(self) -> torch.Tensor | None:
        """Clip the gradient before an optimiser step; its norm, where it is clipped."""
        limit = self._job.config.optim.max_grad_norm
        if not limit or not self._accelerator.sync_gradients:
            return None
        norm: torch.Tensor = self._accelerator.clip_grad_norm_(self.trained.values(), limit)
        return norm

    def moved(self) -> float:
        """An optimiser step was made; returns the learning rate that it was made with."""
        lr = float(self.schedule.get_last_lr()[0])
        self.step += 1
        self.schedule.step()
        if self.average is not None:
            self.average.step(self.trained.values())
        return lr

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the model's place, where there are any."""
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
            raise FaceShardsError(
                f"the weights at step {self.step} are not finite, the training diverged: go back to an earlier "
                "checkpoint with a lower optim.lr"
            )
        ranks = gather_object([self._rank_state()])
        if self._accelerator.is_main_process:
            average = None
            if self.average is not None:
                average = dict(zip(self.trained, self.average.shadow_params, strict=True))
            state = {
                "step": self.step,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "average": None if self.average is None else _plain(self.average.state_dict()),
                "scaler": None if self._accelerator.scaler is None else self._accelerator.scaler.state_dict(),
                "ranks": ranks,
            }
            self._job.run.save(self.step, self.trained, average, state, self._job.config.watch.keep)
        self._accelerator.wait_for_everyone()

    def _rank_state(self) -> dict[str, Any]:
        state = {"torch": torch.get_rng_state(), "generator": self.generator.get_state()}
        if self._accelerator.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._accelerator.device)
        return {**state, "loader": self.loader.state_dict()}

    def restore(self, step: int) -> None:
        """Go back to a checkpoint, random states and data order included.

        Raises:
            OutputError: when it is damaged, or was written by another number of processes.
        """
        weights, average, state = self._job.run.load(step)
        ranks = state["ranks"]
        if len(ranks) != self._accelerator.num_processes:
            raise OutputError(
                f"{self._job.run.root} was trained by {len(ranks)} processes and cannot go on with "
                f"{self._accelerator.num_processes}: start as many."
            )
        self.model.load_trained(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None and average is not None:
            self.average.load_state_dict({**state["average"], "shadow_params": [average[key] for key in self.trained]})
            self.average.to(self._accelerator.device)
        if self._accelerator.scaler is not None and state["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        self._restore_rank(ranks[self._accelerator.process_index])
        self.step = step

    def _restore_rank(self, mine: dict[str, Any]) -> None:
        self.loader = self._make_loader(mine["loader"])
        torch.set_rng_state(mine["torch"])
        self.generator.set_state(mine["generator"])
        if "cuda" in mine and self._accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(mine["cuda"], self._accelerator.device)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """An EMA's counters without its weights, which lie beside it."""
    return {key: value for key, value in state.items() if key != "shadow_params"}


def _model(job: Job, base: Base) -> AdapterModel:
    """The adapter in its base, from scratch or from a released file, ready to train."""
    settings = job.config.adapter
    model = AdapterModel(base.unet, job.variant, job.widths, settings)
    if settings.init_from:
        tensors = read_released(Path(settings.init_from))
        require_fit(Path(settings.init_from), tensors, model.trained(), job.variant.name)
        model.load_trained(tensors)
    model.to(base.device)
    model.train()
    if job.config.optim.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    if job.config.optim.channels_last:
        base.unet.to(memory_format=torch.channels_last)
    if job.config.optim.compile:
        base.unet.compile()
    return model
