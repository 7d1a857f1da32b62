"""How weights move: optimiser, and learning rate over time."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from pipeline.train.settings import OptimSettings
from schemas.errors import ConfigError


def optimizer(parameters: Iterable[nn.Parameter], settings: OptimSettings) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' 8-bit AdamW; a ConfigError when that is configured and not installed."""
    options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "betas": settings.betas}
    if not settings.eight_bit:
        # Fused: one pass over the weights, and no temporary copies of all of them. Not with fp16's scaler: a fused
        # step leaves itself out, and nobody learns that it was.
        return torch.optim.AdamW(parameters, **options, fused=settings.precision != "fp16")
    if find_spec("bitsandbytes") is None:
        raise ConfigError("optim.eight_bit needs bitsandbytes, which is not installed: pip install bitsandbytes.")
    import bitsandbytes

    adam: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, **options)
    return adam


def schedule(adam: torch.optim.Optimizer, settings: OptimSettings, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over `steps` optimiser steps: warm-up, then constant or a cosine to zero."""
    name = {"constant": "constant_with_warmup", "cosine": "cosine"}[settings.schedule]
    made: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        name, adam, num_warmup_steps=settings.warmup_steps, num_training_steps=steps
    )
    return made
