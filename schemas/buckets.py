"""Sizes of training pictures: about one area, several aspects; and how a picture is scaled and cut to one.

Shared by whoever precomputes latents and whoever reads pictures, so that both cut alike. All sizes are (width, height)
in pixels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

Size = tuple[int, int]
"""(width, height), pixels."""

PIXELS_PER_LATENT = 8
"""Along each side."""
_COARSE_FROM = 512
"""Under this resolution, steps of 64 pixels would leave hardly any bucket."""


class Fit(NamedTuple):
    """A picture scaled to `resized`, from which `size` is cut at `offset`."""

    resized: Size
    offset: tuple[int, int]
    """(left, top), pixels of the scaled picture."""
    size: Size


def buckets(resolution: int, max_aspect: float = 2.0) -> tuple[Size, ...]:
    """The sizes that pictures of a resolution are cut to, sorted by aspect (width / height).

    Sides are multiples of 64 (of 8 under 512), areas are at most resolution x resolution and as close to it as these
    allow, aspects lie within 1 / max_aspect and max_aspect. (resolution, resolution) is always among them.

    Raises:
        ValueError: when resolution is no positive multiple of 8.
    """
    if resolution < PIXELS_PER_LATENT or resolution % PIXELS_PER_LATENT:
        raise ValueError(f"a resolution is a positive multiple of {PIXELS_PER_LATENT}, not {resolution}")
    step = 64 if resolution >= _COARSE_FROM else PIXELS_PER_LATENT
    tall = []
    for width in range(step, resolution, step):
        height = resolution * resolution // width // step * step
        if width < height <= max_aspect * width:
            tall.append((width, height))
    return (*tall, (resolution, resolution), *((height, width) for width, height in reversed(tall)))


def nearest(width: int, height: int, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect is the nearest, by ratio; the narrower one of two that are equally near."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))


def fit(width: int, height: int, size: Size, at: tuple[float, float] = (0.5, 0.5)) -> Fit:
    """Scale a picture to cover `size` with nothing to spare on one axis, and cut it at the relative position `at`.

    `at` is 0 for the left or upper end, 1 for the other, 0.5 for the middle.
    """
    scale = max(size[0] / width, size[1] / height)
    resized = max(size[0], round(width * scale)), max(size[1], round(height * scale))
    left, top = (round(part * (whole - cut)) for part, whole, cut in zip(at, resized, size, strict=True))
    return Fit(resized, (left, top), size)


def fit_around(width: int, height: int, size: Size, box: Sequence[float]) -> Fit:
    """As `fit` in the middle, shifted no farther than it takes to hold a box (x0, y0, x1, y1, pixels of the picture).

    A box that is larger than the cut is held by its centre.
    """
    resized = fit(width, height, size).resized
    at = tuple(
        _position(resized[axis], size[axis], *(box[side] * resized[axis] / whole for side in (axis, axis + 2)))
        for axis, whole in enumerate((width, height))
    )
    return fit(width, height, size, (at[0], at[1]))


def bucketed(crop: str, size: Size, face: Sequence[float], sizes: Sequence[Size]) -> Fit:
    """The cut of a crop's picture around the face in it: `full` to its nearest size, the squares to the square."""
    return fit_around(*size, nearest(*(size if crop == "full" else (1, 1)), sizes), face)


def in_crop(bbox: Sequence[float], box: Sequence[float], size: Size) -> list[float]:
    """A box of the photo in pixels of the picture that has `size` and shows the part `box` of the photo."""
    scales = [size[0] / (box[2] - box[0]), size[1] / (box[3] - box[1])] * 2
    return [(value - start) * scale for value, start, scale in zip(bbox, [*box[:2]] * 2, scales, strict=True)]


def _position(whole: int, cut: int, low: float, high: float) -> float:
    """Where, from 0 to 1, a cut of one axis lies that holds low..high."""
    spare = whole - cut
    if spare == 0:
        return 0.5
    if high - low > cut:
        low = high = (low + high) / 2
        start = low - cut / 2
    else:
        start = min(max(spare / 2, math.ceil(high) - cut), math.floor(low))
    return min(max(start, 0), spare) / spare
