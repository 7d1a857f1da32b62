"""A frozen base model: its UNet and noise schedule, and its encoders, which are loaded when they are first needed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from torch import Tensor

from pipeline.shared.bases import TINY, BaseSource
from pipeline.train.adapters.released import DAMAGED
from pipeline.train.objective import sent
from schemas.arrays import Array
from schemas.errors import WeightsError, first_line
from schemas.targets import variant_of

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

_ENCODERS = {"vae", "_texts", "_encoder"}
"""Parts of a Base that are loaded when they are first needed."""


class TextEmbeds(NamedTuple):
    embeds: Tensor
    """(B, 77, C)."""
    pooled: Tensor | None
    """(B, P), SDXL only."""


class Base:
    """A base model on one device; nothing of it is trained."""

    def __init__(self, source: BaseSource, device: torch.device, dtype: torch.dtype) -> None:
        """Load the UNet and the noise schedule.

        `dtype` is that of all parts but SDXL's VAE, whose activations overflow in half precision, unless its config
        says that they do not (force_upcast).

        Raises:
            WeightsError: when a part of the folder is missing or damaged.
        """
        self.source, self.kind, self.device, self.dtype = source, source.kind, device, dtype
        self.scheduler = self._load(diffusers.DDPMScheduler, "scheduler")
        self.unet = self._model(diffusers.UNet2DConditionModel, "unet", dtype)

    @cached_property
    def vae(self) -> Any:
        vae = self._model(diffusers.AutoencoderKL, "vae", torch.float32 if self.kind == "sdxl" else self.dtype)
        return vae if vae.config.force_upcast else vae.to(self.dtype)

    @cached_property
    def _texts(self) -> dict[str, Any]:
        """Tokenizers and text encoders, by their names in diffusers' pipelines."""
        parts = {
            "tokenizer": self._load(transformers.CLIPTokenizer, "tokenizer"),
            "text_encoder": self._model(transformers.CLIPTextModel, "text_encoder", self.dtype),
        }
        if self.kind == "sdxl":
            parts["tokenizer_2"] = self._load(transformers.CLIPTokenizer, "tokenizer_2")
            projected = transformers.CLIPTextModelWithProjection
            parts["text_encoder_2"] = self._model(projected, "text_encoder_2", self.dtype)
        return parts

    def _model(self, cls: Any, part: str, dtype: torch.dtype) -> Any:
        # `torch_dtype` is known to all releases of both libraries; `dtype` to transformers from 4.56 on
        options = {"use_safetensors": True, "variant": variant_of(self.source.folder / part), "torch_dtype": dtype}
        model, report = self._load(cls, part, output_loading_info=True, **options)
        missing = sorted(report["missing_keys"])
        if missing:  # left without values, or with random ones
            raise self._unusable(cls, part, f"its files lack {len(missing)} weights, such as {missing[0]}")
        # transformers 4.49 leaves CLIPTextModelWithProjection in float32
        return model.eval().requires_grad_(False).to(self.device, dtype)

    def _load(self, cls: Any, part: str, **options: Any) -> Any:
        try:
            return cls.from_pretrained(str(self.source.folder / part), local_files_only=True, **options)
        except DAMAGED as error:
            raise self._unusable(cls, part, first_line(error)) from error

    def _unusable(self, cls: Any, part: str, why: str) -> WeightsError:
        folder = self.source.folder
        is_tiny = self.source.name in TINY
        advice = f"delete {folder}, and it is made again" if is_tiny else "fetch the base again"
        return WeightsError(f"{folder / part} cannot be loaded as {cls.__name__} ({why}): {advice}.")

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1], RGB -> latents (B, 4, H / 8, W / 8) float32, scaled.

        They are sampled from the posterior by a CPU `generator`; without one, its mean is taken.
        """
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        latents = posterior.mean.float()
        if generator is not None:
            noise = torch.randn(latents.shape, generator=generator)
            latents = latents + posterior.std.float() * sent(noise, latents.device)
        scaled: Tensor = latents * self.vae.config.scaling_factor
        return scaled

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextEmbeds:
        """Captions, cut at 77 tokens, as the stock pipelines encode them.

        SD1.5: the last hidden state. SDXL: the penultimate ones of both encoders side by side, and the projected text
        of the second.
        """
        encoded = self._encoder.encode_prompt(
            list(captions), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return TextEmbeds(encoded[0], encoded[2] if self.kind == "sdxl" else None)

    @cached_property
    def _encoder(self) -> Any:
        return self._pipeline(vae=None)

    def sampler(self) -> Any:
        """A stock pipeline over these parts, with a DDIM schedule, for validation images."""
        return self._pipeline(vae=self.vae)

    def _pipeline(self, vae: Any) -> Any:
        scheduler = diffusers.DDIMScheduler.from_config(self.scheduler.config, clip_sample=False)
        parts = {**self._texts, "unet": self.unet, "vae": vae, "scheduler": scheduler}
        if self.kind == "sdxl":
            pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
        else:
            none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = diffusers.StableDiffusionPipeline(**parts, **none)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def release_encoders(self) -> None:
        """Free the VAE and the text encoders; they are loaded again when they are needed again."""
        for name in _ENCODERS:
            self.__dict__.pop(name, None)

    @contextmanager
    def encoders_as_before(self) -> Iterator[None]:
        """Free at the end what was loaded inside."""
        loaded = self.__dict__.keys() & _ENCODERS
        try:
            yield
        finally:
            for name in _ENCODERS - loaded:
                self.__dict__.pop(name, None)

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> pixels (B, 3, 8 h, 8 w), about [-1, 1], RGB; differentiable."""
        pixels: Tensor = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        return pixels.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Array:
        """Scaled latents (B, 4, h, w) -> (B, 8 h, 8 w, 3) RGB."""
        pixels = (self.decode_pixels(latents).clamp(-1, 1) + 1) * 127.5
        images: Array = pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return images
