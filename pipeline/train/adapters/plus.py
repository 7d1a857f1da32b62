"""`plus`: image tokens gathered by a Resampler with 16 learned queries."""

from torch import nn

from pipeline.train.adapters.base import Kind, Widths
from pipeline.train.adapters.resampler import Resampler


class Plus:
    """`plus`; `plus-face` differs in what its condition shows, which the shards decide, and in its name."""

    name = "plus"
    reads: tuple[str, ...] = ("hidden",)
    lora = False

    @staticmethod
    def image_proj(widths: Widths) -> nn.Module:
        """(B, 257, features) -> (B, 16, text)."""
        return Resampler(widths.resampler, widths.features, widths.text)

    @staticmethod
    def released_name(kind: Kind) -> str:
        """See Variant."""
        return "ip-adapter-plus_sd15" if kind == "sd15" else "ip-adapter-plus_sdxl_vit-h"
