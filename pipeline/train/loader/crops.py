"""Which crop of a photo is the target, and where it is cut."""

import math
from bisect import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.train.settings import CropWeights
from schemas.buckets import Fit, Size, fit_around, nearest

CROPS = ("portrait", "half", "full")
_OTHER_SIDE = [1, 0, 2, 4, 3]
"""Left and right eye and mouth corner change sides in a mirror."""

Box = Sequence[float]
"""x0, y0, x1, y1 in pixels."""


class TargetCrop(NamedTuple):
    """One crop of a photo, and how it becomes a target."""

    box: Box
    """In the photo."""
    size: Size
    """Of its picture."""
    fit: Fit
    """How the picture is scaled and cut."""

    def on_target(self, points: npt.NDArray[np.float64], mirror: bool) -> npt.NDArray[np.float32]:
        """Points (5, 2) of the photo in pixels of the target.

        Edges scale, and middles of pixels lie half a pixel behind them.

        Raises:
            ValueError: when they are not finite.
        """
        start = np.array(self.box[:2])
        scale = np.array(self.fit.resized) / (np.array(self.box[2:]) - start)
        placed = (points + 0.5 - start) * scale - 0.5 - np.array(self.fit.offset)
        if not np.isfinite(placed).all():
            raise ValueError("kps are not finite")
        if mirror:
            placed = placed[_OTHER_SIDE]
            placed[:, 0] = self.fit.size[0] - 1 - placed[:, 0]
        return np.asarray(placed, np.float32)


class Balance:
    """Picks crops so that their shares approach the weights, though some are often absent: these are made up for."""

    def __init__(self, weights: CropWeights) -> None:
        self._weights = {crop: float(getattr(weights, crop)) for crop in CROPS}
        self._counts: Counter[str] = Counter()

    def pick(self, there: Mapping[str, TargetCrop], draw: float) -> str:
        """One of the crops that are there.

        Those that would be enlarged are taken only when no other is there, the largest first; so are those of no
        weight.

        Args:
            there: name -> crop, at least one.
            draw: uniform in [0, 1).
        """
        weighted = [crop for crop in CROPS if crop in there and self._weights[crop]]
        # Those whose picture fills all pixels of the target.
        candidates = [crop for crop in weighted if there[crop].fit.resized[0] <= there[crop].size[0]]
        if not candidates:
            candidates = [max(weighted or there, key=lambda crop: (min(there[crop].size), crop))]
        picked = candidates[0]
        if len(candidates) > 1:
            # A chance in proportion to what each lacks of its share among the candidates.
            weights = sum(self._weights[crop] for crop in candidates)
            picks = sum(self._counts[crop] for crop in candidates) + 1
            lacks = [max(0.0, self._weights[crop] / weights * picks - self._counts[crop]) for crop in candidates]
            index = bisect(list(accumulate(lacks)), draw * sum(lacks))
            picked = candidates[index if index < len(candidates) else lacks.index(max(lacks))]
        self._counts[picked] += 1
        return picked


def bucketed(crop: str, size: Size, face: Box, sizes: Sequence[Size]) -> Fit:
    """The cut of a crop as precomputed latents have it: `full` to its nearest size, the squares to the square."""
    return fit_around(*size, nearest(*(size if crop == "full" else (1, 1)), sizes), face)


def random_square(size: Size, face: Box, side: int, at: tuple[float, float]) -> Fit:
    """A random square that holds the face; one that is too large is held by its centre.

    Args:
        size: of the picture.
        face: box in it.
        side: of the square, pixels.
        at: two uniform draws in [0, 1), for the horizontal and the vertical position.
    """
    middle = fit_around(*size, (side, side), face)
    starts = []
    for axis, draw in enumerate(at):
        scale = middle.resized[axis] / size[axis]
        first = max(0, math.ceil(face[axis + 2] * scale) - side)
        last = min(middle.resized[axis] - side, math.floor(face[axis] * scale))
        starts.append(first + int(draw * (last - first + 1)) if first <= last else middle.offset[axis])
    return middle._replace(offset=(starts[0], starts[1]))
