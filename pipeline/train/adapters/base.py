"""What a variant declares, and the widths that decide its shapes."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor, nn

Kind = Literal["sd15", "sdxl"]
"""Layout of the base model: Stable Diffusion 1.5's, or SDXL's (two text encoders, micro-conditioning)."""

HEAD = 64
"""Width of an attention head in all published projections."""
ID_WIDTH = 512
"""Width of a face recogniser's vector."""


@dataclass(frozen=True)
class Widths:
    """What the shapes of an adapter follow from."""

    kind: Kind
    text: int
    """Width of the text tokens (`cross_attention_dim`): 768 for SD1.5, 2048 for SDXL."""
    features: int = 1280
    """Width of the image encoder's tokens: 1280 for ViT-H/14 hidden states, 1024 for DINOv2-L/14."""
    pooled: int = 1024
    """Width of pooled image features: 1024 for ViT-H/14 `image_embeds`, DINOv2's own width for its class token."""

    @property
    def resampler(self) -> int:
        """Inner width of the `plus` Resampler: 768 on SD1.5, 1280 on SDXL."""
        return min(self.text, 1280)


class ImageProj(Protocol):
    """An `image_proj` network: the condition's features to image tokens."""

    def __call__(self, *features: Tensor) -> Tensor:
        """Features, in the order of the variant's `reads`, batch first -> (B, tokens, text width)."""


class Variant(Protocol):
    """One IP-Adapter variant; a class with these attributes, one per file, registered in VARIANTS."""

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    """Shard columns that are its condition: `arcface`, `pooled` (clip, or DINO's class token), `hidden` (clip_hidden
    or dino). The last two depend on the image encoder; see `columns`."""
    lora: ClassVar[bool]
    """Whether a LoRA on every attention is trained along."""

    @staticmethod
    def image_proj(widths: Widths) -> nn.Module:
        """A new network with PyTorch's initial values; see ImageProj."""

    @staticmethod
    def released_name(kind: Kind) -> str:
        """File name without suffix, as the published adapters are called."""
