"""The CLIP image tower in Hugging Face form, for adapters that are conditioned on CLIP: OpenCLIP ViT-H/14."""

import numpy as np
import numpy.typing as npt

from stages.models.base import Image, ModelCard
from stages.models.torch_backend import CLIP, in_batches, normalise, prepare, require_batches_equal_singles
from stages.models.transformers_folder import load
from stages.models.weights import card, resolve
from stages.settings import ModelSettings


class ClipVitH:
    """`image_embeds` (projected, not normalised) and penultimate `hidden_states` (no final norm), float16.

    Shapes follow the folder's config: (1024,) and (257, 1280) for ViT-H/14. Computed in float32 on the CPU and
    float16 on a GPU.
    """

    def __init__(self, settings: ModelSettings) -> None:
        self._device = prepare(settings)
        from transformers import CLIPVisionModelWithProjection

        self._model = load(CLIPVisionModelWithProjection, resolve("clip-vit-h", settings), self._device)
        require_batches_equal_singles(self._run, "clip-vit-h", self._device)

    @classmethod
    def cards(cls, settings: ModelSettings) -> list[ModelCard]:
        """The safetensors file; see the protocol."""
        return [card("clip-vit-h", "image_embedder", settings)]

    def embed(self, images: Image) -> dict[str, npt.NDArray[np.float16]]:
        """`clip` (N, D) and `clip_hidden` (N, tokens, width) of (N, 224, 224, 3) RGB images."""
        return in_batches(self._run, images, self._device)

    def _run(self, images: Image) -> dict[str, npt.NDArray[np.float16]]:
        import torch

        with torch.inference_mode():
            pixels = torch.from_numpy(normalise(images, CLIP)).to(self._device, self._model.dtype)
            out = self._model(pixel_values=pixels, output_hidden_states=True)
        return {"clip": _half(out.image_embeds), "clip_hidden": _half(out.hidden_states[-2])}
