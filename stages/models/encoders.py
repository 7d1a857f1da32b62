"""The frozen encoders of a diffusion base, from a local diffusers folder: pictures to latents, captions to embeddings.

A CPU computes in float32. A GPU computes in float16, but for the VAE of SDXL, whose activations overflow there. One
picture or caption at a time, so that bytes do not depend on batches.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.arrays import Image
from stages.models.torch_backend import HALF, normalise, prepare
from stages.models.tower import load_folder, load_tokenizer
from stages.runtime import Device, EncoderSource

Halves = npt.NDArray[np.float16]


class Vae:
    """The image encoder of a base."""

    def __init__(self, source: EncoderSource, device: Device) -> None:
        prepare(device)
        from diffusers import AutoencoderKL
        from diffusers.utils import logging

        logging.set_verbosity_error()
        gpu_dtype = "float16" if source.kind == "sd15" else "float32"
        self._model = load_folder(AutoencoderKL, Path(source.folder, "vae"), device, gpu_dtype)

    def encode(self, image: Image) -> Halves:
        """(H, W, 3) RGB, sides multiples of 8 -> (8, H / 8, W / 8): mean and log-variance of the scaled latents."""
        import torch

        with torch.inference_mode():
            pixels = torch.from_numpy(normalise(image[None], HALF)).to(self._model.device, self._model.dtype)
            posterior, scale = self._model.encode(pixels).latent_dist, self._model.config.scaling_factor
            moments = posterior.mean.float() * scale, posterior.logvar.float() + 2 * math.log(scale)
        latents: Halves = torch.cat(moments, dim=1)[0].cpu().numpy().astype(np.float16)
        return latents


class TextEncoder:
    """The text encoder of SD1.5, or both of SDXL, used as the stock pipelines do."""

    def __init__(self, source: EncoderSource, device: Device) -> None:
        prepare(device)
        import transformers

        self._is_sdxl = source.kind == "sdxl"
        names = [("", "CLIPTextModel"), *([("_2", "CLIPTextModelWithProjection")] if self._is_sdxl else [])]
        self._encoders = []
        for suffix, cls in names:
            tokenizer = load_tokenizer(Path(source.folder, f"tokenizer{suffix}"))
            encoder = Path(source.folder, f"text_encoder{suffix}")
            self._encoders.append((tokenizer, load_folder(getattr(transformers, cls), encoder, device)))

    def encode(self, caption: str) -> dict[str, Halves]:
        """Column -> features: `text_embeds` (77, C), and for SDXL `text_pooled` (P,); cut at 77 tokens.

        SD1.5: the last hidden state. SDXL: the penultimate ones of both encoders side by side, and the projected
        text of the second.
        """
        import torch

        outputs = []
        for tokenizer, model in self._encoders:
            length = tokenizer.model_max_length
            tokens = tokenizer(caption, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                outputs.append(model(tokens.input_ids.to(model.device), output_hidden_states=True))
        if not self._is_sdxl:
            return {"text_embeds": _halves(outputs[0].last_hidden_state)}
        states = np.concatenate([_halves(output.hidden_states[-2]) for output in outputs], axis=1)
        return {"text_embeds": states, "text_pooled": _halves(outputs[1].text_embeds)}


def _halves(batch_of_one: Any) -> Halves:
    array: Halves = batch_of_one[0].float().cpu().numpy().astype(np.float16)
    return array
