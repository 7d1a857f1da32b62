"""DINOv2 in Hugging Face form, for adapters that are conditioned on it instead of CLIP."""

from typing import Any

from stages.models.papers import WEIGHTS
from stages.models.torch_backend import IMAGENET
from stages.models.tower import Tower


class DinoV2(Tower):
    """`dino`: `last_hidden_state` after the final norm, (N, 257, 1024) for DINOv2-L/14, the class token first."""

    papers = WEIGHTS["dinov2"]
    model_class = "Dinov2Model"
    mean_std = IMAGENET

    def _features(self, pixels: Any) -> dict[str, Any]:
        return {"dino": self._model(pixel_values=pixels).last_hidden_state}
