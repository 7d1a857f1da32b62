"""The eight IP-Adapter variants: their projections, and the table of what each reads and trains.

A projection turns the features of a face into image tokens. Its parameters carry the names of the published files, and
its numbers of tokens are those that every program which reads such files has hard-wired.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pipeline.train.adapters import require_known
from pipeline.train.settings import AdapterSettings
from schemas.targets import BaseKind

HEAD = 64
"""Width of an attention head in all published projections."""
DEPTH, FF_MULT = 4, 4
"""Hard-wired in every program that reads such files."""
ID_WIDTH = 512
"""Width of a face recogniser's vector."""


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
    """A Perceiver with 16 learned latents."""

    def __init__(self, dim: int, features: int, width_out: int) -> None:
        """Latents are drawn with standard deviation 1 / sqrt(dim)."""
        super().__init__(dim, features, width_out)
        self.latents = nn.Parameter(torch.randn(1, 16, dim) / dim**0.5)

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]  # its latents are its own
        """(B, N, features) -> (B, 16, width_out)."""
        return super().forward(self.latents.expand(len(features), -1, -1), features)


@dataclass(frozen=True)
class Widths:
    """What the shapes of an adapter follow from."""

    kind: BaseKind
    text: int
    """Width of the text tokens (`cross_attention_dim`): 768 for SD1.5, 2048 for SDXL."""
    features: int = 1280
    """Width of the image encoder's tokens: 1280 for ViT-H/14 hidden states, 1024 for DINOv2-L/14."""
    pooled: int = 1024
    """Width of pooled image features: 1024 for ViT-H/14 `image_embeds`, DINOv2's own width for its class token."""


class ImageProjection(nn.Module):
    """Pooled features through one Linear; keys `proj`, `norm`."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.proj = nn.Linear(widths.pooled, 4 * widths.text)
        self.norm = nn.LayerNorm(widths.text)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, pooled) -> (B, 4, text)."""
        tokens: Tensor = self.norm(self.proj(pooled).unflatten(-1, (-1, *self.norm.normalized_shape)))
        return tokens


class TokenMlp(nn.Module):
    """Every image token by itself, the class token included; keys `proj.0` and `.2` (Linears), `proj.3` (LayerNorm)."""

    def __init__(self, widths: Widths) -> None:
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


class IdMlp(nn.Module):
    """One vector of a face recogniser to tokens; keys `proj.0` and `.2` (Linears, an exact GELU between), `norm`."""

    def __init__(self, widths: Widths, num_tokens: int = 4) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(ID_WIDTH, 2 * ID_WIDTH), nn.GELU(), nn.Linear(2 * ID_WIDTH, num_tokens * widths.text)
        )
        self.norm = nn.LayerNorm(widths.text)

    def id_tokens(self, arcface: Tensor) -> Tensor:
        """Normed vectors (B, 512) -> (B, tokens, text); (B, F, 512) of F faces -> (B, F * tokens, text)."""
        tokens: Tensor = self.norm(self.proj(arcface).unflatten(-1, (-1, *self.norm.normalized_shape)))
        return tokens.flatten(1, -2)

    def forward(self, *features: Tensor) -> Tensor:
        return self.id_tokens(*features)


class IdQueries(IdMlp):
    """ID tokens as the queries of a Perceiver over the image features; its keys stand under `perceiver_resampler`."""

    def __init__(self, widths: Widths) -> None:
        super().__init__(widths)
        self.perceiver_resampler = Perceiver(widths.text, widths.features, widths.text)

    def forward(self, *features: Tensor) -> Tensor:
        """ID (B, 512) and image features (B, 257, features) -> (B, 4, text)."""
        arcface, hidden = features
        out: Tensor = self.perceiver_resampler(self.id_tokens(arcface), hidden)
        return out


class ShortcutQueries(IdQueries):
    """ID tokens + image branch; the weights of `IdQueries`, and nothing in a file but its name tells the two apart.

    While training, each sample loses the image branch with probability `p_drop`, so that the ID tokens carry the
    identity alone half of the time. The branch is not rescaled then unless `rescale` is set: inference adds it as it
    is.
    """

    def __init__(self, widths: Widths, p_drop: float, rescale: bool) -> None:
        super().__init__(widths)
        self.p_drop, self.rescale = p_drop, rescale

    def forward(self, *features: Tensor) -> Tensor:
        """ID (B, 512) and image features (B, 257, features) -> (B, 4, text)."""
        arcface, hidden = features
        ids = self.id_tokens(arcface)
        branch: Tensor = self.perceiver_resampler(ids, hidden)
        if self.training and self.p_drop:
            # One draw per sample. Dropped is times zero: processes that train together wait for every gradient.
            keep = (torch.rand(len(branch), 1, 1, device=branch.device) >= self.p_drop).to(branch.dtype)
            branch = branch * (keep / max(1 - self.p_drop, 1e-6) if self.rescale else keep)
        return ids + branch


@dataclass(frozen=True)
class Variant:
    name: str
    reads: tuple[str, ...]
    """Roles of its condition, in the order in which the projection takes them: `arcface` (B, 512), `pooled` (CLIP's
    image_embeds, or DINO's class token), `hidden` (the image encoder's tokens)."""
    image_proj: Callable[[Widths, AdapterSettings], nn.Module]
    """A new projection with PyTorch's initial values: its features, batch first -> (B, tokens, text)."""
    lora: bool = False
    """Whether a LoRA on every attention is trained along."""
    faces: int = 1
    """Most ID vectors side by side, (B, F, 512): at inference, and of F other photos of the person in training."""
    shortcut: bool = False
    """Whether the ID tokens are added to the image branch, which no file can say of itself."""

    def released_name(self, kind: BaseKind, image_encoder: str) -> str:
        """File name without suffix, as the published adapters are called.

        SDXL's name their image encoder, but for the FaceID family; other encoders than the published one are named
        wherever their features are read.
        """
        stem = "ip-adapter" if self.name == "ip-adapter" else f"ip-adapter-{self.name}"
        if image_encoder != "clip-vit-h" and {"pooled", "hidden"} & set(self.reads):
            return f"{stem}_{kind}_{image_encoder}"
        return f"{stem}_{kind}_vit-h" if kind == "sdxl" and "arcface" not in self.reads else f"{stem}_{kind}"


def _resampler(widths: Widths, _: AdapterSettings) -> nn.Module:
    """16 learned queries over the image tokens; 768 wide on SD1.5, 1280 on SDXL."""
    return Resampler(min(widths.text, 1280), widths.features, widths.text)


_TABLE = (
    # name, what its condition is, projection of it
    Variant("ip-adapter", ("pooled",), lambda widths, _: ImageProjection(widths)),
    Variant("plus", ("hidden",), _resampler),
    # The network of `plus`: what differs is the condition, the aligned face, with the photo around it as the target.
    Variant("plus-face", ("hidden",), _resampler),
    # 257 tokens, which keep the structure of the face. Released for SD1.5 only.
    Variant("full-face", ("hidden",), lambda widths, _: TokenMlp(widths)),
    # With a LoRA, since ID vectors alone are slow to learn from.
    Variant("faceid", ("arcface",), lambda widths, _: IdMlp(widths), lora=True),
    # Up to five faces are put side by side at inference; trained so too with data.pairs.
    Variant("faceid-portrait", ("arcface",), lambda widths, _: IdMlp(widths, 16), faces=5),
    # The image features dominate. Released for SD1.5 only.
    Variant("faceid-plus", ("arcface", "hidden"), lambda widths, _: IdQueries(widths), lora=True),
    # The ID first, structure beside it.
    Variant(
        "faceid-plusv2",
        ("arcface", "hidden"),
        lambda widths, settings: ShortcutQueries(widths, settings.p_drop_clip, settings.rescale_clip),
        lora=True,
        shortcut=True,
    ),
)
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _TABLE}


def variant(name: str) -> Variant:
    """The variant of that name; a ConfigError lists the known ones when there is none."""
    require_known(name)
    return VARIANTS[name]
