"""From a batch of the loader to what the model is called with, on its device."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.train.base_model import Base, TextEmbeds
from pipeline.train.loader import Batch


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
        dropped = batch.uncond_text.tolist()
        # As it is stored, half as many bytes and from pinned memory, so without waiting; converted where it arrives.
        batch = batch.to(self._base.device)
        text, pooled = self._text(batch, dropped)
        added = None
        if self._base.kind == "sdxl":
            assert pooled is not None
            # Never in bf16, which rounds whole numbers above 256.
            added = {"text_embeds": pooled, "time_ids": batch.size_ids}
        condition = {role: value.float() for role, value in batch.condition.items()}
        return Inputs(self._latents(batch), text, condition, added)

    def _latents(self, batch: Batch) -> Tensor:
        if batch.latents is not None:
            return batch.latents.float()
        assert batch.pixels is not None
        return self._base.encode_images(batch.pixels, self._generator)

    def _text(self, batch: Batch, dropped: Sequence[bool]) -> TextEmbeds:
        if batch.text_embeds is None:
            return self._base.encode_text(
                ["" if drop else text for text, drop in zip(batch.captions, dropped, strict=True)]
            )
        dtype = self._base.dtype
        given = TextEmbeds(batch.text_embeds, batch.text_pooled)
        embeds, pooled = (
            None if value is None or none is None else _where(batch.uncond_text, none.to(dtype), value.to(dtype))
            for value, none in zip(given, self._nothing(), strict=True)
        )
        assert embeds is not None
        return TextEmbeds(embeds, pooled)

    def _nothing(self) -> TextEmbeds:
        """The embedding of no caption, encoded once; nothing else needs the text encoders then."""
        if self._empty is None:
            self._empty = self._base.encode_text([""])
            self._base.release_encoders()
        return self._empty


def _where(uncond: Tensor, none: Tensor, value: Tensor) -> Tensor:
    return torch.where(uncond.view(-1, *[1] * (value.ndim - 1)), none, value)
