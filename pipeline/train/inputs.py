"""From a batch of the loader to what the model is called with, on its device."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.train.base_model import Base, TextEmbeds
from pipeline.train.loader.batches import Batch
from pipeline.train.objective import sent


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


@dataclass
class Preparer:
    """Encodes what the shards do not hold, and puts "no caption" where the text was drawn to be unconditional."""

    base: Base
    generator: torch.Generator
    """On the CPU; samples latents."""
    _empty: TextEmbeds | None = None

    def __call__(self, batch: Batch) -> Inputs:
        base, dropped = self.base, batch.uncond_text.tolist()
        # As it is stored, half or a quarter of the bytes, from pinned memory and without waiting; made float32 there.
        batch = batch.to(base.device)
        if batch.text_embeds is None:
            captions = ["" if drop else text for text, drop in zip(batch.captions, dropped, strict=True)]
            text = base.encode_text(captions)
        else:
            text = self._precomputed(batch)
        added = None
        if base.kind == "sdxl":
            assert text.pooled is not None
            # Never in bf16, which rounds whole numbers above 256.
            added = {"text_embeds": text.pooled, "time_ids": batch.size_ids}
        if batch.latents is not None:
            mean, log_variance = batch.latents.float().chunk(2, dim=1)
            drawn = torch.randn(mean.shape, generator=self.generator)
            latents = mean + (log_variance / 2).exp() * sent(drawn, mean.device)
        else:
            assert batch.pixels is not None
            latents = base.encode_images(batch.pixels, self.generator)
        return Inputs(latents, text.embeds, {role: value.float() for role, value in batch.condition.items()}, added)

    def _precomputed(self, batch: Batch) -> TextEmbeds:
        """The texts of the shards; nothing but the embedding of no caption, made once, needs the text encoders then."""
        if self._empty is None:
            self._empty = self.base.encode_text([""])
            self.base.release_encoders()
        dtype, drop = self.base.dtype, batch.uncond_text
        assert batch.text_embeds is not None
        embeds = torch.where(drop.view(-1, 1, 1), self._empty.embeds.to(dtype), batch.text_embeds.to(dtype))
        if batch.text_pooled is None or self._empty.pooled is None:
            return TextEmbeds(embeds, None)
        return TextEmbeds(
            embeds, torch.where(drop.view(-1, 1), self._empty.pooled.to(dtype), batch.text_pooled.to(dtype))
        )
