"""The ID loss: whether the clean image that the UNet predicts shows the same person as the true one.

It needs gradients, so it runs facexlib's ArcFace in torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.train.adapters.released import DAMAGED
from pipeline.train.alignment import align
from pipeline.train.objective import Noised, predicted_clean
from pipeline.train.settings import ObjectiveSettings
from schemas.errors import ConfigError, WeightsError, first_line

if TYPE_CHECKING:
    from pipeline.train.base_model import Base
    from pipeline.train.loader.batches import Batch

WEIGHTS_URL = "https://github.com/xinntao/facexlib/releases/download/v0.1.0/recognition_arcface_ir_se50.pth"


class IdLoss:
    """1 - cosine between the identities of two images of the same face, by facexlib's frozen ArcFace.

    Both sides are embedded by this recogniser: the ID vectors of the shards are another one's.
    """

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Load facexlib's IR-SE50, frozen, from a state dict that fits exactly; nothing is ever fetched.

        Raises:
            WeightsError: when the file is missing or holds something else.
        """
        if not weights.is_file():
            raise WeightsError(
                f"{weights} does not exist: fetch {WEIGHTS_URL} and set objective.id_loss_weights to the file."
            )
        from facexlib.recognition.arcface_arch import Backbone

        with torch.device("meta"):  # no time on initial values
            model: nn.Module = Backbone(num_layers=50, drop_ratio=0.6, mode="ir_se")
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            model.load_state_dict(state, strict=True, assign=True)
        except DAMAGED as error:
            raise WeightsError(
                f"{weights} is not recognition_arcface_ir_se50.pth ({first_line(error)}): fetch {WEIGHTS_URL}."
            ) from error
        self._recogniser = model.float().eval().requires_grad_(False).to(device)

    def __call__(self, pixels: Tensor, kps: Tensor, target_pixels: Tensor) -> Tensor:
        """Loss (B,) float32 per sample, with gradients to `pixels` alone.

        Args:
            pixels: (B, 3, H, W) predicted images, RGB in [-1, 1].
            kps: (B, 5, 2) points of the face in pixels of both images.
            target_pixels: (B, 3, H, W) the true images.
        """
        with torch.no_grad():
            true = self.embed(target_pixels, kps)
        return 1 - functional.cosine_similarity(self.embed(pixels, kps), true)

    def embed(self, pixels: Tensor, kps: Tensor) -> Tensor:
        """Normed ID vectors (B, 512) float32 of RGB images in [-1, 1]."""
        with torch.autocast(pixels.device.type, enabled=False):
            # This ArcFace was trained on images whose channels OpenCV had decoded as BGR.
            vectors: Tensor = self._recogniser(align(pixels, kps).flip(1))
        return vectors


def id_loss_of(settings: ObjectiveSettings, base: "Base") -> Callable[[Tensor, Noised, Tensor, "Batch"], Tensor] | None:
    """The ID loss as a term of the objective, of clean images as the UNet predicts them at low noise; None where off.

    It takes the UNet's output (B, 4, h, w), what the UNet was given, clean latents (B, 4, h, w), and the batch, whose
    `kps` (B, 5, 2) are points of the face in pixels of the target. It gives the weighted mean, a float32 scalar, of the
    samples with a face as their condition (others would teach the unconditional branch an identity), 0 without any;
    those of higher noise count as zero.

    Raises:
        ConfigError: when it is on without weights.
        WeightsError: when the weights cannot be used.
    """
    if not settings.id_loss:
        return None
    if not settings.id_loss_weights:
        raise ConfigError(
            "objective.id_loss needs a face recogniser: fetch"
            f" {WEIGHTS_URL} and set objective.id_loss_weights to the file."
        )
    loss = IdLoss(Path(settings.id_loss_weights).expanduser(), base.device)
    limit = settings.id_loss_max_t * base.scheduler.config.num_train_timesteps

    def term(noise_pred: Tensor, noised: Noised, latents: Tensor, batch: "Batch") -> Tensor:
        has_face = ~batch.uncond_image.to(latents.device)
        chosen = has_face & (noised.timesteps < limit)
        if not chosen.any():
            return torch.zeros((), device=latents.device)
        some = Noised(*(part[chosen] for part in noised))
        predicted = base.decode_pixels(predicted_clean(base.scheduler, noise_pred[chosen], some))
        with torch.no_grad():
            true = base.decode_pixels(latents[chosen])
        losses = loss(predicted, batch.kps.to(latents.device)[chosen], true)
        return settings.id_loss * losses.sum() / has_face.sum()

    return term
