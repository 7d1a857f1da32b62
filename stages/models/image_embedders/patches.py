"""Colours and gradients of 16x16 patches, projected to the shapes of the CLIP ViT-H/14 image tower.

Classical and honest about it: the numbers describe what each patch looks like and know nothing of what it shows.
They let everything behind an image embedder run, and be tested, without 2.5 GB of weights.
Gradients are summed by direction and sign as in HOG (Dalal and Triggs, CVPR 2005, doi:10.1109/CVPR.2005.177).
"""

from collections.abc import Mapping
from functools import cache

import cv2
import numpy as np

from schemas.arrays import Doubles, Floats, Halves, Image
from stages.models.backends import WithoutWeights
from stages.runtime import Device
from stages.settings import ModelSettings

_GRID = 16
_QUARTER = 7
"""Side of a quarter of a patch, pixels: 14 px patches as in ViT-H/14 are described in quarters."""
_POOLED_GRID = 4
_HIDDEN, _EMBEDS = 1280, 1024
_FEATURES = 4 * (3 + 8) + 2
_SEED = 20_050_177
_STEPS = 32
"""Projections are rounded to multiples of 1 / 32 and features are whole: every sum below is exact, so that the
numbers do not depend on the order in which a linear algebra library adds, nor on its threads."""
_SPREAD = 400.0
"""Divides the features after projection: tokens then have a root mean square near 1, as CLIP's have."""


class Patches(WithoutWeights):
    """`clip` (N, 1024) and `clip_hidden` (N, 257, 1280), float16, by fixed random projections."""

    runtime, task = "numpy cpu", "image_embedder"

    def __init__(self, settings: ModelSettings, device: Device) -> None:
        cv2.setNumThreads(1)
        self._to_hidden, self._to_embeds = _projections()

    def embed(self, images: Image) -> Mapping[str, Halves]:
        """`clip` and `clip_hidden` of (N, 224, 224, 3) RGB images; row 0 of `clip_hidden` describes the mean patch."""
        embeds, hidden = [], []
        for patches in map(_describe, images):
            pooled = np.rint(_mean_blocks(patches, _GRID // _POOLED_GRID).astype(np.float64)).ravel()
            embeds.append(pooled @ self._to_embeds / (_STEPS * _SPREAD * _POOLED_GRID))
            flat = patches.reshape(-1, _FEATURES)
            rows = np.vstack([np.rint(flat.mean(axis=0, dtype=np.float64)).astype(np.float32), flat])
            hidden.append((rows @ self._to_hidden / np.float32(_STEPS * _SPREAD)).astype(np.float16))
        return {
            "clip": np.array(embeds, np.float16).reshape(-1, _EMBEDS),
            "clip_hidden": np.array(hidden, np.float16).reshape(-1, 1 + _GRID**2, _HIDDEN),
        }

    def unconditional(self) -> Mapping[str, Halves]:
        """`clip_hidden` of plain mid-grey (128), which is where colours and gradients of a patch are zero."""
        grey = np.full((1, 224, 224, 3), 128, np.uint8)
        return {"clip_hidden": self.embed(grey)["clip_hidden"][0]}


@cache
def _projections() -> tuple[Floats, Doubles]:
    """To hidden states and to embeds; drawn once a process, not to be written to."""
    random = np.random.Generator(np.random.PCG64(_SEED))
    shapes = (_FEATURES, _HIDDEN), (_FEATURES * _POOLED_GRID**2, _EMBEDS)
    to_hidden, to_embeds = (np.rint(random.standard_normal(shape) * _STEPS) for shape in shapes)
    return to_hidden.astype(np.float32), to_embeds


def _describe(image: Image) -> Floats:
    """(16, 16, 46) whole numbers: per patch its quarters' mean colours (-128..127) and gradients, and its position.

    Gradients are grey-level slopes towards the 8 neighbours, each 0 where it falls.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    x, y = cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)
    slopes = np.stack([x, y, (x + y) * np.float32(0.5**0.5), (x - y) * np.float32(0.5**0.5)], axis=2)
    gradients = np.concatenate([np.maximum(slopes, 0), np.maximum(-slopes, 0)], axis=2)
    colours = _mean_blocks(image.astype(np.float32), _QUARTER) - 128
    quarters = np.rint(np.concatenate([colours, _mean_blocks(gradients, _QUARTER)], axis=2))
    patches = quarters.reshape(_GRID, 2, _GRID, 2, -1).transpose(0, 2, 1, 3, 4).reshape(_GRID, _GRID, -1)
    position = np.indices((_GRID, _GRID), np.float32).transpose(1, 2, 0) * 16 - 120
    return np.concatenate([patches, position], axis=2).astype(np.float32)


def _mean_blocks(values: Floats, side: int) -> Floats:
    """Means of (H, W, C) over blocks of side x side: (H / side, W / side, C)."""
    size = values.shape[1] // side, values.shape[0] // side
    means: Floats = cv2.resize(values, size, interpolation=cv2.INTER_AREA)
    return means
