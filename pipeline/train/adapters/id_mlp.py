"""The ID projection that the FaceID family shares: one vector of a face recogniser to a few tokens."""

from torch import Tensor, nn

from pipeline.train.adapters.base import ID_WIDTH


class IdMlp(nn.Module):
    """Two Linears with an exact GELU between, split into tokens, LayerNorm; keys `proj.0`, `proj.2`, `norm`."""

    def __init__(self, num_tokens: int, width_out: int) -> None:
        """`num_tokens` tokens of width `width_out`; the hidden width is twice the input's."""
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(ID_WIDTH, 2 * ID_WIDTH), nn.GELU(), nn.Linear(2 * ID_WIDTH, num_tokens * width_out)
        )
        self.norm = nn.LayerNorm(width_out)

    def id_tokens(self, arcface: Tensor) -> Tensor:
        """Normed vectors (B, 512) -> (B, tokens, width); (B, F, 512) of several faces -> (B, F * tokens, width)."""
        tokens: Tensor = self.norm(self.proj(arcface).unflatten(-1, (-1, self.norm.normalized_shape[0])))
        return tokens.flatten(1, -2)

    def forward(self, *features: Tensor) -> Tensor:
        """See `id_tokens`."""
        return self.id_tokens(*features)
