"""`ip-adapter`: pooled image features through one Linear, 4 tokens."""

from torch import Tensor, nn

from pipeline.train.adapters.base import Kind, Widths

NUM_TOKENS = 4
"""Hard-wired in every program that reads such files."""


class ImageProjection(nn.Module):
    """Keys `proj.weight`, `proj.bias`, `norm.weight`, `norm.bias`."""

    def __init__(self, widths: Widths) -> None:
        """(B, pooled) to 4 tokens of the text's width."""
        super().__init__()
        self.proj = nn.Linear(widths.pooled, NUM_TOKENS * widths.text)
        self.norm = nn.LayerNorm(widths.text)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, pooled) -> (B, 4, text)."""
        tokens: Tensor = self.norm(self.proj(pooled).unflatten(-1, (NUM_TOKENS, -1)))
        return tokens


class IpAdapter:
    """The base variant."""

    name = "ip-adapter"
    reads = ("pooled",)
    lora = False
    image_proj = ImageProjection

    @staticmethod
    def released_name(kind: Kind) -> str:
        """See Variant."""
        return "ip-adapter_sd15" if kind == "sd15" else "ip-adapter_sdxl_vit-h"
