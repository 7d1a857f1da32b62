"""The frozen encoders of a diffusion base, from a local diffusers folder: pictures to latents, captions to embeddings.

A CPU computes in float32, one picture or caption at a time, so that bytes do not depend on batches. A GPU computes in
batches of one size in float16, but for the VAE of SDXL, whose activations overflow there unless its config says that
they do not (force_upcast).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from schemas.arrays import Halves, Image
from stages.models.torch_backend import HALF, Batches, normaliser, on_device, prepare
from stages.models.tower import load_folder, load_tokenizer
from stages.runtime import Device, EncoderSource

_GPU_CAPTIONS = 16


class Vae:
    def __init__(self, source: EncoderSource, device: Device) -> None:
        prepare(device)
        import torch
        from diffusers import AutoencoderKL
        from diffusers.utils import logging

        logging.set_verbosity_error()
        gpu_dtype = "float16" if source.kind == "sd15" else "float32"
        model = load_folder(AutoencoderKL, Path(source.folder, "vae"), device, gpu_dtype)
        if device == "cuda" and not model.config.force_upcast:
            model = model.half()
        model, scale = on_device(model, device, model.dtype), model.config.scaling_factor
        normalise = normaliser(*HALF, device, model.dtype)

        def moments(images: Any) -> tuple[Any]:
            posterior = model.encode(normalise(images)).latent_dist
            return (torch.cat((posterior.mean.float() * scale, posterior.logvar.float() + 2 * math.log(scale)), dim=1),)

        # One picture fills a GPU, and few are of one size; graphs would hold the memory of each size.
        self._batches = Batches(moments, 1, device, graphs=False)

    def encode(self, images: Sequence[Image]) -> list[Halves]:
        """(H, W, 3) RGB, sides multiples of 8 -> (8, H / 8, W / 8): mean and log-variance of the scaled latents."""
        return [latents.astype(np.float16) for (latents,) in self._batches(images)]


class TextEncoder:
    """The text encoder of SD1.5, or both of SDXL, used as the stock pipelines do."""

    def __init__(self, source: EncoderSource, device: Device) -> None:
        prepare(device)
        import torch
        import transformers

        is_sdxl = source.kind == "sdxl"
        names = [("", "CLIPTextModel"), *([("_2", "CLIPTextModelWithProjection")] if is_sdxl else [])]
        self._tokenizers = [load_tokenizer(Path(source.folder, f"tokenizer{suffix}")) for suffix, _ in names]
        models = [
            load_folder(getattr(transformers, cls), Path(source.folder, f"text_encoder{suffix}"), device)
            for suffix, cls in names
        ]

        def embedded(tokens: Any) -> tuple[Any, ...]:
            outputs = [model(tokens[:, i], output_hidden_states=True) for i, model in enumerate(models)]
            if not is_sdxl:
                return (outputs[0].last_hidden_state,)
            return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1].text_embeds

        self._batches = Batches(embedded, 1 if device == "cpu" else _GPU_CAPTIONS, device, graphs=False)

    def encode(self, captions: Sequence[str]) -> list[dict[str, Halves]]:
        """Column -> features of each: `text_embeds` (77, C), and for SDXL `text_pooled` (P,); cut at 77 tokens.

        SD1.5: the last hidden state. SDXL: the penultimate ones of both encoders side by side, and the projected
        text of the second.
        """
        options = {"padding": "max_length", "truncation": True}
        tokens = [
            np.array([one(caption, max_length=one.model_max_length, **options).input_ids for one in self._tokenizers])
            for caption in captions
        ]
        return [
            {
                name: array.astype(np.float16)
                for name, array in zip(("text_embeds", "text_pooled"), arrays, strict=False)
            }
            for arrays in self._batches(tokens)
        ]
