"""`faceid-plus`: ID tokens are the queries of a Perceiver over the image features of the face."""

from torch import Tensor

from pipeline.train.adapters.base import Kind, Widths
from pipeline.train.adapters.id_mlp import IdMlp
from pipeline.train.adapters.resampler import Perceiver

NUM_TOKENS = 4
"""Hard-wired in every program that reads such files."""


class IdQueries(IdMlp):
    """Keys of the ID MLP, and those of the Perceiver under `perceiver_resampler`."""

    def __init__(self, widths: Widths) -> None:
        """A Perceiver as wide as the text."""
        super().__init__(NUM_TOKENS, widths.text)
        self.perceiver_resampler = Perceiver(widths.text, widths.features, widths.text)

    def forward(self, *features: Tensor) -> Tensor:
        """ID (B, 512) and image features (B, 257, features) -> (B, 4, text)."""
        arcface, hidden = features
        out: Tensor = self.perceiver_resampler(self.id_tokens(arcface), hidden)
        return out


class FaceIdPlus:
    """ID and structure; the image features dominate. Released for SD1.5 only."""

    name = "faceid-plus"
    reads = ("arcface", "hidden")
    lora = True
    image_proj = IdQueries

    @staticmethod
    def released_name(kind: Kind) -> str:
        """See Variant."""
        return f"ip-adapter-faceid-plus_{kind}"
