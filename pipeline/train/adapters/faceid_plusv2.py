"""`faceid-plusv2`: faceid-plus with a shortcut, ID tokens + s x image branch; the branch is dropped while training."""

import torch
from torch import Tensor

from pipeline.train.adapters.base import Kind
from pipeline.train.adapters.faceid_plus import IdQueries


class ShortcutQueries(IdQueries):
    """The weights of `IdQueries`; nothing in a file tells the two apart but its name.

    While training, each sample loses the image branch with probability `p_drop`, so that the ID tokens carry the
    identity alone half of the time. The kept branch is not rescaled unless `rescale` is set: inference adds it as it
    is.
    """

    p_drop = 0.5
    rescale = False
    shortcut = True
    shortcut_scale = 1.0

    def forward(self, *features: Tensor) -> Tensor:
        """ID (B, 512) and image features (B, 257, features) -> (B, 4, text)."""
        arcface, hidden = features
        ids = self.id_tokens(arcface)
        branch: Tensor = self.perceiver_resampler(ids, hidden)
        if not self.shortcut:
            return branch
        if self.training and self.p_drop:
            branch = branch * self._kept(branch)
        return ids + self.shortcut_scale * branch

    def _kept(self, branch: Tensor) -> Tensor:
        """(B, 1, 1): 0 for dropped samples, for kept ones 1 (or 1 / (1 - p_drop))."""
        kept = (torch.rand(len(branch), 1, 1, device=branch.device) >= self.p_drop).to(branch.dtype)
        return kept / max(1 - self.p_drop, 1e-6) if self.rescale else kept


class FaceIdPlusV2:
    """ID in the first place, structure beside it."""

    name = "faceid-plusv2"
    reads = ("arcface", "hidden")
    lora = True
    image_proj = ShortcutQueries

    @staticmethod
    def released_name(kind: Kind) -> str:
        """See Variant."""
        return f"ip-adapter-faceid-plusv2_{kind}"
