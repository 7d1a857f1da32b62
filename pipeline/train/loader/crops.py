"""Which crop of a photo is the target, and where it is cut."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipeline.train.settings import CropWeights
from schemas.buckets import Fit, Size, fit_around, nearest

CROPS = ("portrait", "half", "full")

Box = Sequence[float]
"""x0, y0, x1, y1 in pixels."""


class Crop(NamedTuple):
    """One crop of a photo, and how it becomes a target."""

    box: Box
    """In the photo."""
    size: Size
    """Of its picture."""
    fit: Fit
    """How the picture is scaled and cut."""

    @property
    def enlarged(self) -> bool:
        """Whether the target has more pixels than the picture can fill."""
        return self.fit.resized[0] > self.size[0]


class Balance:
    """Picks crops so that their shares approach the weights, though some are often absent: these are made up for."""

    def __init__(self, weights: CropWeights) -> None:
        """Nothing was picked yet."""
        self._weights = {crop: float(getattr(weights, crop)) for crop in CROPS}
        self._counts: Counter[str] = Counter()

    def pick(self, there: Mapping[str, Crop], draw: float) -> str:
        """One of the crops that are there.

        Those that would be enlarged are taken only when no other is there, the largest first; so are those of no
        weight.

        Args:
            there: name -> crop, at least one.
            draw: uniform in [0, 1).
        """
        picked = self._drawn(self._candidates(there), draw)
        self._counts[picked] += 1
        return picked

    def _candidates(self, there: Mapping[str, Crop]) -> list[str]:
        weighted = [crop for crop in CROPS if crop in there and self._weights[crop]]
        if not weighted:
            return [_largest(there, there)]
        return [crop for crop in weighted if not there[crop].enlarged] or [_largest(weighted, there)]

    def _drawn(self, candidates: Sequence[str], draw: float) -> str:
        """A candidate, with a chance in proportion to what it lacks of its share among the candidates."""
        if len(candidates) == 1:
            return candidates[0]
        weights = sum(self._weights[crop] for crop in candidates)
        picks = sum(self._counts[crop] for crop in candidates) + 1
        lacks = [max(0.0, self._weights[crop] / weights * picks - self._counts[crop]) for crop in candidates]
        left = draw * sum(lacks)
        for crop, lack in zip(candidates, lacks, strict=True):
            left -= lack
            if left < 0:
                return crop
        return candidates[lacks.index(max(lacks))]


def _largest(names: Sequence[str] | Mapping[str, Crop], there: Mapping[str, Crop]) -> str:
    return max(names, key=lambda crop: (min(there[crop].size), crop))


def bucketed(crop: str, size: Size, face: Box, sizes: Sequence[Size]) -> Fit:
    """The cut of a crop as precomputed latents have it: `full` to its nearest size, the squares to the square."""
    return fit_around(*size, nearest(*(size if crop == "full" else (1, 1)), sizes), face)


def random_square(size: Size, face: Box, side: int, at: tuple[float, float]) -> Fit:
    """A square at a random place that holds the face; one that is too large is held by its centre.

    Args:
        size: of the picture.
        face: box in it.
        side: of the square, pixels.
        at: two uniform draws in [0, 1), for the horizontal and the vertical place.
    """
    middle = fit_around(*size, (side, side), face)
    starts = []
    for axis, draw in enumerate(at):
        scale = middle.resized[axis] / size[axis]
        first = max(0, math.ceil(face[axis + 2] * scale) - side)
        last = min(middle.resized[axis] - side, math.floor(face[axis] * scale))
        starts.append(first + int(draw * (last - first + 1)) if first <= last else middle.offset[axis])
    return middle._replace(offset=(starts[0], starts[1]))
