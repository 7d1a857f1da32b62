"""From a batch of the loader to what the model is called with, on its device."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.loader import Batch
from pipeline.training.base import Base, TextEmbeds


class Inputs(NamedTuple):
    """One forward pass, but for the noise."""

    latents: Tensor
    """(B, 4, h, w) float32."""
    text: Tensor
    """(B, 77, text)."""
    condition: dict[str, Tensor]
    """Role -> features of the faces, float32."""
    added: dict[str, Tensor] | None
    """SDXL's `text_embeds` (B, P) and `time_ids` (B, 6)."""


class Preparer:
    """Encodes what the shards do not hold, and puts "no caption" where the text was drawn to be unconditional."""

    def __init__(self, base: Base, generator: torch.Generator) -> None:
        """Work with the encoders of `base`; `generator` (CPU) samples latents of images."""
        self._base = base
        self._generator = generator
        self._empty: TextEmbeds | None = None

    def __call__(self, batch: Batch) -> Inputs:
        """A batch on the base's device."""
        device = self._base.device
        text, pooled = self._text(batch)
        added = None
        if self._base.kind == "sdxl":
            assert pooled is not None
            added = {"text_embeds": pooled, "time_ids": batch.size_ids.to(device, text.dtype)}
        condition = {role: value.to(device, torch.float32) for role, value in batch.condition.items()}
        return Inputs(self._latents(batch), text, condition, added)

    def _latents(self, batch: Batch) -> Tensor:
        if batch.latents is not None:
            return batch.latents.to(self._base.device, torch.float32)
        assert batch.pixels is not None
        return self._base.encode_images(batch.pixels, self._generator)

    def _text(self, batch: Batch) -> TextEmbeds:
        if batch.text_embeds is None:
            dropped = batch.uncond_text.tolist()
            return self._base.encode_text(
                ["" if drop else text for text, drop in zip(batch.captions, dropped, strict=True)]
            )
        device, dtype = self._base.device, self._base.dtype
        uncond = batch.uncond_text.to(device)
        empty = self._nothing()
        given = TextEmbeds(batch.text_embeds, batch.text_pooled)
        embeds, pooled = (
            None if value is None or none is None else _where(uncond, none.to(dtype), value.to(device, dtype))
            for value, none in zip(given, empty, strict=True)
        )
        assert embeds is not None
        return TextEmbeds(embeds, pooled)

    def _nothing(self) -> TextEmbeds:
        """The embedding of no caption, encoded once."""
        if self._empty is None:
            self._empty = self._base.encode_text([""])
        return self._empty


def _where(uncond: Tensor, none: Tensor, value: Tensor) -> Tensor:
    return torch.where(uncond.view(-1, *[1] * (value.ndim - 1)), none, value)


def unconditional(dataset_features: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The condition "no face" in the shapes of `like`: role -> features."""
    return {role: dataset_features[role].to(value).expand_as(value) for role, value in like.items()}
