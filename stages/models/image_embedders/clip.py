"""The CLIP image tower in Hugging Face form, for adapters that are conditioned on CLIP: OpenCLIP ViT-H/14."""

from typing import Any

from stages.models.papers import WEIGHTS
from stages.models.torch_backend import CLIP
from stages.models.tower import Tower


class ClipVitH(Tower):
    """`clip`: `image_embeds`, projected, not normalised, (N, 1024); `clip_hidden`: penultimate `hidden_states`.

    The latter are (N, 257, 1280), the class token first, and have not passed the final norm.
    """

    papers = WEIGHTS["clip-vit-h"]
    text = WEIGHTS["clip-vit-h-text"]
    """The whole model: its text tower puts words where `clip` puts what shows them."""
    model_class = "CLIPVisionModelWithProjection"
    mean_std = CLIP

    def _features(self, pixels: Any) -> dict[str, Any]:
        out = self._model(pixel_values=pixels, output_hidden_states=True)
        return {"clip": out.image_embeds, "clip_hidden": out.hidden_states[-2]}
