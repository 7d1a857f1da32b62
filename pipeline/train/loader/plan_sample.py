"""What becomes of a sample: its crop, place, mirroring, colours and unconditional parts, drawn before any decoding."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.train.loader.crops import CROPS, Balance, Box, Crop, bucketed, random_square
from pipeline.train.loader.decode import meta, targets
from pipeline.train.loader.reading import Reading
from pipeline.train.loader.shards import Raw
from pipeline.train.settings import GuidanceSettings, TrainConfig
from schemas.buckets import Fit, Size, buckets

_OTHER_SIDE = [1, 0, 2, 4, 3]
"""Left and right eye and mouth corner change places in a mirror."""
_COLOUR_RANGE = 0.2
"""Largest relative change of brightness, contrast and saturation."""


class _Draws(NamedTuple):
    """Uniform in [0, 1). Each sample has all of them, used or not, so that one setting does not move another's."""

    crop: float
    x: float
    y: float
    flip: float
    colour: float
    brightness: float
    contrast: float
    saturation: float
    uncond: float


class Planned(NamedTuple):
    """A sample that only needs to be decoded."""

    raw: Raw
    """Of the targets, that of the crop alone."""
    caption: str
    crop: str
    size: Size
    """Of the crop's picture."""
    fit: Fit
    kps: npt.NDArray[np.float32]
    """(5, 2) x y in pixels of the target, mirrored where it is; the middle of the first pixel is (0, 0)."""
    mirror: bool
    colour: tuple[float, float, float] | None
    """Factors of brightness, contrast and saturation."""
    uncond_image: bool
    uncond_text: bool


class Planner:
    """Decides for one sample after the other, in the order of a consumer's stream in one epoch."""

    def __init__(self, reading: Reading, config: TrainConfig, draws: np.random.Generator) -> None:
        """Nothing is decided yet; `draws` is used up by _Draws per sample."""
        self._reading = reading
        self._config = config
        self._draws = draws
        self._balance = Balance(config.data.crops)
        self._sizes = buckets(config.data.resolution)

    def __call__(self, raw: Raw) -> Planned | None:
        """Decide for the next sample; None for one that has no crop, as its json says: the photo gave none.

        Raises:
            CorruptShardError: when its json cannot be used, or it lacks a file that the json speaks of.
        """
        draws = _Draws(*self._draws.random(len(_Draws._fields)).tolist())
        content = meta(raw)
        try:
            there = self._crops(raw, content, draws)
            if not there:
                return None
            name = self._balance.pick(there, draws.crop)
            mirror = draws.flip < self._reading.flip
            points = _placed(np.asarray(content["kps"], np.float64).reshape(5, 2), there[name], mirror)
            caption = str(content["text"])
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError) as error:
            raise raw.corrupt("json", f"lacks or misspells a field: {type(error).__name__}: {error}") from error
        uncond_image, uncond_text = _uncond(draws.uncond, self._config.guidance)
        return Planned(
            raw=_without_others(raw, self._reading, name),
            caption=caption,
            crop=name,
            size=there[name].size,
            fit=there[name].fit,
            kps=points,
            mirror=mirror,
            colour=_factors(draws) if draws.colour < self._reading.colour else None,
            uncond_image=uncond_image,
            uncond_text=uncond_text,
        )

    def _crops(self, raw: Raw, content: Mapping[str, Any], draws: _Draws) -> dict[str, Crop]:
        """The crops that can be the target."""
        cuts = _cuts(raw) if self._reading.latents else None
        found = {}
        for crop in CROPS:
            told = content["crops"][crop]
            if "box" in told and (cuts is None or crop in cuts):
                box, size = _box(told["box"]), _size(told["size"])
                face = _inside(_box(content["bbox"]), box, size)
                found[crop] = Crop(box, size, self._fit(crop, size, face, draws) if cuts is None else cuts[crop])
        for crop in found:
            if self._reading.target(crop) not in raw.files:
                raise raw.corrupt(self._reading.target(crop), "is missing")
        return found

    def _fit(self, crop: str, size: Size, face: Box, draws: _Draws) -> Fit:
        data = self._config.data
        if data.buckets:
            return bucketed(crop, size, face, self._sizes)
        return random_square(size, face, data.resolution, (draws.x, draws.y))


def _cuts(raw: Raw) -> Mapping[str, Fit]:
    told = targets(raw)
    if told is None:
        raise raw.corrupt("json", "does not say how its latents were cut")
    return told.latents


def _box(told: Any) -> list[float]:
    x0, y0, x1, y1 = map(float, told)
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"{told} is no box")
    return [x0, y0, x1, y1]


def _size(told: Any) -> Size:
    width, height = map(int, told)
    if width < 1 or height < 1:
        raise ValueError(f"{told} is no size")
    return width, height


def _inside(box: Box, crop: Box, size: Size) -> list[float]:
    """A box in pixels of a crop's picture."""
    scales = [size[0] / (crop[2] - crop[0]), size[1] / (crop[3] - crop[1])] * 2
    return [(value - start) * scale for value, start, scale in zip(box, [*crop[:2]] * 2, scales, strict=True)]


def _placed(points: npt.NDArray[np.float64], crop: Crop, mirror: bool) -> npt.NDArray[np.float32]:
    """Points of the photo in pixels of the target; edges scale, and middles of pixels lie half a pixel behind them."""
    start = np.array(crop.box[:2])
    scale = np.array(crop.fit.resized) / (np.array(crop.box[2:]) - start)
    placed = (points + 0.5 - start) * scale - 0.5 - np.array(crop.fit.offset)
    if not np.isfinite(placed).all():
        raise ValueError("kps are not finite")
    if mirror:
        placed = placed[_OTHER_SIDE]
        placed[:, 0] = crop.fit.size[0] - 1 - placed[:, 0]
    return np.asarray(placed, np.float32)


def _without_others(raw: Raw, reading: Reading, crop: str) -> Raw:
    """The sample without the targets that were not picked: a buffer of samples is to be small."""
    others = {reading.target(other) for other in CROPS if other != crop}
    return raw._replace(files={suffix: data for suffix, data in raw.files.items() if suffix not in others})


def _factors(draws: _Draws) -> tuple[float, float, float]:
    bright, contrast, saturation = (
        1 + _COLOUR_RANGE * (2 * draw - 1) for draw in (draws.brightness, draws.contrast, draws.saturation)
    )
    return bright, contrast, saturation


def _uncond(draw: float, told: GuidanceSettings) -> tuple[bool, bool]:
    """Whether image and text are unconditional; one draw decides."""
    text_from = told.p_uncond_image
    both_from = text_from + told.p_uncond_text
    end = both_from + told.p_uncond_both
    return draw < text_from or both_from <= draw < end, text_from <= draw < end
