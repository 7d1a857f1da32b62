"""The denoising objective in pure functions: noise, target, weights, loss, and the clean image that a prediction means.

All random numbers come from one generator on the CPU, so that a run repeats bit for bit on any device.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pipeline.train.alignment import in_face
from pipeline.train.settings import ObjectiveSettings
from schemas.buckets import PIXELS_PER_LATENT
from schemas.errors import ConfigError

if TYPE_CHECKING:
    from diffusers import DDPMScheduler


class Noised(NamedTuple):
    """Latents at a random step of the noise schedule, and what the UNet is to predict of them."""

    noisy_latents: Tensor
    """(B, 4, h, w) float32."""
    noise: Tensor
    """(B, 4, h, w) float32: what was added."""
    timesteps: Tensor
    """(B,) int64."""
    target: Tensor
    """(B, 4, h, w) float32: noise, velocity or the clean latents, as the base predicts."""


def noised(
    scheduler: "DDPMScheduler", latents: Tensor, settings: ObjectiveSettings, generator: torch.Generator
) -> Noised:
    """Add noise to clean, scaled latents (B, 4, h, w), on any device, at uniformly drawn timesteps.

    The scheduler's prediction type decides on the target. `generator` is on the CPU.

    Raises:
        ConfigError: for a base that predicts something else than Stable Diffusion bases do.
    """
    latents = latents.float()
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    if settings.noise_offset:
        noise += settings.noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
    timesteps, noise = sent(timesteps, latents.device), sent(noise, latents.device)
    noisy: Tensor = scheduler.add_noise(latents, noise, timesteps)
    kind = _prediction_type(scheduler)
    if kind == "v_prediction":
        target: Tensor = scheduler.get_velocity(latents, noise, timesteps)
    else:
        target = noise if kind == "epsilon" else latents
    return Noised(noisy, noise, timesteps, target)


def sent(drawn: Tensor, device: torch.device) -> Tensor:
    """What was drawn on the CPU, on a device: by pinned memory, so without waiting for the steps under way."""
    return (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)


def weights(scheduler: "DDPMScheduler", timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR weight (B,) float32 of each timestep: the loss on the clean image, weighted by min(SNR, gamma).

    `gamma` 0 gives ones. At a terminal SNR of zero the weight is the limit, not a division by zero.
    """
    if not gamma:
        return torch.ones(len(timesteps), device=timesteps.device)
    signal, noise = (amplitude.flatten() for amplitude in _amplitudes(scheduler, timesteps))
    snr = (signal / noise).square()
    kind = _prediction_type(scheduler)
    if kind == "epsilon":
        return gamma / snr.clamp_min(gamma)  # = min(snr, gamma) / snr
    capped = snr.clamp_max(gamma)
    return capped / (snr + 1) if kind == "v_prediction" else capped


def face_weights(kps: Tensor, latents: Tensor, weight: float) -> Tensor | None:
    """Weights (B, 1, h, w) float32 of latents (B, 4, h, w), by which each in the face counts `weight` times as much.

    A sample's weights are 1 on average, so that its loss is as large as before, however small its face. The face is the
    square that ArcFace sees, by its points: kps (B, 5, 2) on the CPU, in pixels of the target. None for all alike.
    """
    if weight == 1:
        return None
    height, width = latents.shape[-2:]
    raised = 1 + (weight - 1) * in_face(kps, (height, width), PIXELS_PER_LATENT).float()
    return sent(raised / raised.mean((1, 2), keepdim=True), latents.device)[:, None]


def denoising_loss(noise_pred: Tensor, noised: Noised, weights: Tensor, latent_weights: Tensor | None = None) -> Tensor:
    """Mean squared error in float32, each sample times its weight (B,), each latent times its own (B, 1, h, w)."""
    errors = (noise_pred.float() - noised.target).square()
    if latent_weights is not None:
        errors = errors * latent_weights
    return (errors.flatten(1).mean(1) * weights).mean()


def predicted_clean(scheduler: "DDPMScheduler", noise_pred: Tensor, noised: Noised) -> Tensor:
    """Clean latents (B, 4, h, w) float32 that the UNet's output stands for; differentiable in `noise_pred`."""
    noise_pred = noise_pred.float()
    signal, noise = _amplitudes(scheduler, noised.timesteps)
    kind = _prediction_type(scheduler)
    if kind == "epsilon":
        # Without any signal nothing can be predicted: a huge value, but a finite one.
        return (noised.noisy_latents - noise * noise_pred) / signal.clamp_min(1e-4)
    if kind == "v_prediction":
        return signal * noised.noisy_latents - noise * noise_pred
    return noise_pred


def _prediction_type(scheduler: "DDPMScheduler") -> str:
    kind: str = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ConfigError(
            f"The base's scheduler has prediction_type {kind!r}; the trainer knows epsilon, v_prediction and sample:"
            " choose another --base."
        )
    return kind


def _amplitudes(scheduler: "DDPMScheduler", timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise amplitudes of noisy latents, (B, 1, 1, 1) each."""
    variance: Tensor = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float().view(-1, 1, 1, 1)
    return variance.sqrt(), (1 - variance).sqrt()
