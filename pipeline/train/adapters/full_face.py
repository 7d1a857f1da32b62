"""`full-face`: every image token through an MLP, 257 tokens, which keep the structure of the face."""

from torch import Tensor, nn

from pipeline.train.adapters.base import Kind, Widths


class TokenMlp(nn.Module):
    """Keys `proj.0`, `proj.2` (Linears) and `proj.3` (LayerNorm)."""

    def __init__(self, widths: Widths) -> None:
        """Each token by itself; the class token included."""
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(widths.features, widths.features),
            nn.GELU(),
            nn.Linear(widths.features, widths.text),
            nn.LayerNorm(widths.text),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, features) -> (B, N, text)."""
        tokens: Tensor = self.proj(hidden)
        return tokens


class FullFace:
    """Released for SD1.5 only; on SDXL the layout follows with its text width."""

    name = "full-face"
    reads = ("hidden",)
    lora = False
    image_proj = TokenMlp

    @staticmethod
    def released_name(kind: Kind) -> str:
        """See Variant."""
        return "ip-adapter-full-face_sd15" if kind == "sd15" else "ip-adapter-full-face_sdxl_vit-h"
