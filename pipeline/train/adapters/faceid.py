"""`faceid`: the normed ID vector as 4 tokens, with a LoRA, since ID vectors alone are slow to learn from."""

from torch import nn

from pipeline.train.adapters.base import Kind, Widths
from pipeline.train.adapters.id_mlp import IdMlp

NUM_TOKENS = 4


class FaceId:
    """ID tokens and LoRA."""

    name = "faceid"
    reads = ("arcface",)
    lora = True

    @staticmethod
    def image_proj(widths: Widths) -> nn.Module:
        """(B, 512) -> (B, 4, text)."""
        return IdMlp(NUM_TOKENS, widths.text)

    @staticmethod
    def released_name(kind: Kind) -> str:
        """See Variant."""
        return f"ip-adapter-faceid_{kind}"
