"""Token features of a batch, part of which is int8 until it lies on the device."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from schemas.int8 import GROUP, Quantised


class MixedTokens(NamedTuple):
    """Features (B, T, D), each sample's in the form that it was stored in; `float` gives them as one tensor."""

    plain: Tensor
    """(B - N, T, D) float16: of samples of float16 shards, and of "no face"; may be none."""
    int8: Tensor
    """(N, T, D)."""
    scale: Tensor
    """(N, T, ceil(D / GROUP)) float16."""
    order: Tensor
    """(B,) int64: where each sample lies in `plain` followed by `int8`."""

    def float(self) -> Tensor:
        """(B, T, D) float32, computed on the device that all of it lies on."""
        steps = self.scale.float().repeat_interleave(GROUP, -1)[..., : self.int8.shape[-1]]
        return torch.cat([self.plain.float(), self.int8 * steps])[self.order]


def mixed(rows: Sequence[npt.NDArray[Any] | Quantised]) -> MixedTokens:
    """Of samples' features (T, D), at least one of which is in int8."""
    is_int8 = np.array([isinstance(row, Quantised) for row in rows])
    plain = [row for row in rows if not isinstance(row, Quantised)]
    quantised = [row for row in rows if isinstance(row, Quantised)]
    return MixedTokens(
        torch.from_numpy(np.array(plain, np.float16).reshape(len(plain), *quantised[0].shape)),
        torch.from_numpy(np.stack([row.int8 for row in quantised])),
        torch.from_numpy(np.stack([row.scale for row in quantised])),
        torch.from_numpy(is_int8.argsort(kind="stable").argsort()),
    )
