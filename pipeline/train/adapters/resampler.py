"""The Resampler (a Perceiver): latent queries gather what matters from image features.

Key names, shapes and arithmetic are those of the published IP-Adapter files (`plus`, `faceid-plus`).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

HEAD = 64
"""Width of an attention head in all published projections."""
DEPTH, FF_MULT = 4, 4
"""Hard-wired in every program that reads such files."""


class PerceiverAttention(nn.Module):
    """Latents attend to image features and to themselves."""

    def __init__(self, dim: int) -> None:
        """Latents and features of width `dim`, `dim / 64` heads."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """(B, N, dim) features and (B, Q, dim) latents -> (B, Q, dim)."""
        features, latents = self.norm1(features), self.norm2(latents)
        key, value = self.to_kv(torch.cat([features, latents], dim=1)).chunk(2, dim=-1)
        query, key, value = (x.unflatten(-1, (-1, HEAD)).transpose(1, 2) for x in (self.to_q(latents), key, value))
        out: Tensor = self.to_out(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return out


def feed_forward(dim: int) -> nn.Sequential:
    """LayerNorm, up by 4, exact GELU, down; no biases in the Linears."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, FF_MULT * dim, bias=False),
        nn.GELU(),
        nn.Linear(FF_MULT * dim, dim, bias=False),
    )


class Perceiver(nn.Module):
    """Four blocks over given latents: `proj_in`, blocks of attention and feed-forward, `proj_out`, `norm_out`."""

    def __init__(self, dim: int, features: int, width_out: int) -> None:
        """Inner width `dim`, features of width `features`, output of width `width_out`."""
        super().__init__()
        self.proj_in = nn.Linear(features, dim)
        self.proj_out = nn.Linear(dim, width_out)
        self.norm_out = nn.LayerNorm(width_out)
        self.layers = nn.ModuleList(nn.ModuleList([PerceiverAttention(dim), feed_forward(dim)]) for _ in range(DEPTH))

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """(B, Q, dim) latents over (B, N, features) features -> (B, Q, width_out)."""
        features = self.proj_in(features)
        for block in self.layers:
            attend, feed = block.children()
            latents = latents + attend(features, latents)
            latents = latents + feed(latents)
        out: Tensor = self.norm_out(self.proj_out(latents))
        return out


class Resampler(Perceiver):
    """A Perceiver with learned latents."""

    def __init__(self, dim: int, features: int, width_out: int, queries: int = 16) -> None:
        """Latents are drawn with standard deviation 1 / sqrt(dim)."""
        super().__init__(dim, features, width_out)
        self.latents = nn.Parameter(torch.randn(1, queries, dim) / dim**0.5)

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]  # its latents are its own
        """(B, N, features) -> (B, queries, width_out)."""
        return super().forward(self.latents.expand(len(features), -1, -1), features)
