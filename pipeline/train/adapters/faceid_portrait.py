"""`faceid-portrait`: 16 ID tokens per face, one to five faces, without LoRA."""

from torch import nn

from pipeline.train.adapters.base import Kind, Widths
from pipeline.train.adapters.id_mlp import IdMlp

NUM_TOKENS = 16


class FaceIdPortrait:
    """Trained on one face per sample; several faces are concatenated at inference."""

    name = "faceid-portrait"
    reads = ("arcface",)
    lora = False

    @staticmethod
    def image_proj(widths: Widths) -> nn.Module:
        """(B, 512) -> (B, 16, text); (B, F, 512) -> (B, 16 F, text)."""
        return IdMlp(NUM_TOKENS, widths.text)

    @staticmethod
    def released_name(kind: Kind) -> str:
        """See Variant."""
        return f"ip-adapter-faceid-portrait_{kind}"
