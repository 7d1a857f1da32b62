"""What becomes of a sample: its crop, cut, mirroring, colours and unconditional parts, drawn before any decoding."""

import math
from bisect import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from pipeline.train.loader.reading import Reading
from pipeline.train.loader.shards import Raw, meta, targets
from pipeline.train.settings import CropWeights, TrainConfig
from schemas.arrays import Doubles, Floats
from schemas.buckets import Fit, Size, bucketed, buckets, fit_around, in_crop
from schemas.columns import CROPS

_OTHER_SIDE = [1, 0, 2, 4, 3]
"""Left and right eye and mouth corner change sides in a mirror."""
_COLOUR_RANGE = 0.2
"""Largest relative change of brightness, contrast and saturation."""
Box = Sequence[float]
"""x0, y0, x1, y1 in pixels."""


class TargetCrop(NamedTuple):
    box: Box
    """In the photo."""
    size: Size
    """Of its picture."""
    fit: Fit
    """How the picture is scaled and cut."""

    def on_target(self, points: Doubles, mirror: bool) -> Floats:
        """Points (5, 2) of the photo in pixels of the target.

        Edges scale, and middles of pixels lie half a pixel behind them.

        Raises:
            ValueError: when they are not finite.
        """
        start = np.array(self.box[:2])
        scale = np.array(self.fit.resized) / (np.array(self.box[2:]) - start)
        kps = (points + 0.5 - start) * scale - 0.5 - np.array(self.fit.offset)
        if not np.isfinite(kps).all():
            raise ValueError("kps are not finite")
        if mirror:
            kps = kps[_OTHER_SIDE]
            kps[:, 0] = self.fit.size[0] - 1 - kps[:, 0]
        return np.asarray(kps, np.float32)


class Balance:
    """Picks crops so that their shares approach the weights, though some are often absent: these are made up for."""

    def __init__(self, weights: CropWeights) -> None:
        self._weights = {crop: float(getattr(weights, crop)) for crop in CROPS}
        self._counts: Counter[str] = Counter()

    def pick(self, there: Mapping[str, TargetCrop], draw: float) -> str:
        """One of the crops that are there, at least one; `draw` is uniform in [0, 1).

        Those that would be enlarged are taken only when no other is there, the largest first.
        """
        # Those whose picture fills all pixels of the target.
        candidates = [crop for crop in there if there[crop].fit.resized[0] <= there[crop].size[0]]
        if not candidates:
            candidates = [max(there, key=lambda crop: (min(there[crop].size), crop))]
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


def random_square(size: Size, face: Box, side: int, at: tuple[float, float]) -> Fit:
    """A random square that holds the face; one that is too large is held by its centre.

    `face` is a box in the picture; `at` are two uniform draws in [0, 1), for the horizontal and the vertical position.
    """
    middle = fit_around(*size, (side, side), face)
    starts = []
    for axis, draw in enumerate(at):
        scale = middle.resized[axis] / size[axis]
        first = max(0, math.ceil(face[axis + 2] * scale) - side)
        last = min(middle.resized[axis] - side, math.floor(face[axis] * scale))
        starts.append(first + int(draw * (last - first + 1)) if first <= last else middle.offset[axis])
    return middle._replace(offset=(starts[0], starts[1]))


class _Draws(NamedTuple):
    """Uniform in [0, 1). Each sample has all of them, used or not, so that one setting does not change another's."""

    crop: float
    x: float
    y: float
    flip: float
    colour: float
    brightness: float
    contrast: float
    saturation: float
    uncond: float
    plain: float


class Planned(NamedTuple):
    """A sample that only needs to be decoded."""

    raw: Raw
    """Of the targets, that of the crop alone."""
    id_from: tuple[Raw, ...]
    """Photos whose ID vectors are the condition: the sample itself, or others of the person."""
    image_from: Raw
    """The photo whose image features are."""
    caption: str
    crop: str
    size: Size
    """Of the crop's picture."""
    fit: Fit
    kps: Floats
    """(5, 2) x y in pixels of the target, mirrored where it is; the middle of the first pixel is (0, 0)."""
    mirror: bool
    colour: tuple[float, float, float] | None
    """Factors of brightness, contrast and saturation."""
    uncond_image: bool
    uncond_text: bool
    plain: bool
    """The condition's image features are of the plain face, where others are of the segmented one."""


class Planner:
    """Decides for one sample after the other, in the order of a consumer's stream in one epoch."""

    def __init__(self, reading: Reading, config: TrainConfig, draws: np.random.Generator) -> None:
        """`draws` is used up by _Draws per sample."""
        self._reading, self._condition = reading, reading.condition
        self._config = config
        self._draws = draws
        # Drawn apart, so that what kind, caption and pairs need moves no other draw.
        self._mixing, self._pairing = draws.spawn(2)
        self._balance = Balance(config.data.crops)
        self._sizes = buckets(config.data.resolution)

    def __call__(self, raw: Raw, others: Sequence[Raw] = ()) -> Planned | None:
        """Decide for the next sample; None for one that is left out: by its kind, or for want of a crop.

        `others` are photos of the same person, of which the condition's files are read.
        """
        draws = _Draws(*self._draws.random(len(_Draws._fields)).tolist())
        kind_draw, caption_draw, which = self._mixing.random(3).tolist()
        pair_draw, count_draw, *which_others = self._pairing.random(2 + self._reading.faces).tolist()
        reading, guidance, content = self._reading, self._config.guidance, meta(raw)
        mirror = draws.flip < reading.flip
        try:
            share = {"web": self._config.data.kinds.web, "made": self._config.data.kinds.made}
            if kind_draw >= share[content.get("source_kind", "web")]:
                return None
            there = self._crops(raw, content, draws)
            if not there:
                return None
            name = self._balance.pick(there, draws.crop)
            crop = there[name]
            points = crop.on_target(np.asarray(content["kps"], np.float64).reshape(5, 2), mirror)
            caption, further = str(content["text"]), content.get("text_alternatives") or []
            if further and caption_draw < reading.alternatives:
                caption = str(further[int(which * len(further))])
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError) as error:
            raise raw.corrupt("json", f"lacks or misspells a field: {type(error).__name__}: {error}") from error

        factors = None
        if draws.colour < reading.colour:
            bright, contrast, saturation = (
                1 + _COLOUR_RANGE * (2 * draw - 1) for draw in (draws.brightness, draws.contrast, draws.saturation)
            )
            factors = bright, contrast, saturation
        # One draw decides: first come those without the face, then without text, then without both.
        text_from = guidance.p_uncond_image
        both_from = text_from + guidance.p_uncond_text
        end = both_from + guidance.p_uncond_both
        # Without other targets, and without its features where another's are the condition: buffers are to be small.
        unused = {reading.target(other) for other in CROPS if other != name}
        drawn, features = [], self._config.data.pair_features
        if others and pair_draw < self._config.data.pairs:
            left, count = list(others), 1 + int(count_draw * min(reading.faces, len(others)))
            drawn = [left.pop(int(draw * len(left))) for draw in which_others[:count]]
            if features == "both":
                unused |= self._condition
        own = raw._replace(files={suffix: data for suffix, data in raw.files.items() if suffix not in unused})
        return Planned(
            raw=own,
            id_from=tuple(drawn) if drawn and features != "image" else (own,),
            image_from=drawn[0] if drawn and features != "id" else own,
            caption=caption,
            crop=name,
            size=crop.size,
            fit=crop.fit,
            kps=points,
            mirror=mirror,
            colour=factors,
            uncond_image=draws.uncond < text_from or both_from <= draws.uncond < end,
            uncond_text=text_from <= draws.uncond < end,
            plain=draws.plain < 0.5,
        )

    def _crops(self, raw: Raw, content: Mapping[str, Any], draws: _Draws) -> dict[str, TargetCrop]:
        data, cuts = self._config.data, None
        if self._reading.latents:
            encoded = targets(raw)
            if encoded is None:
                raise raw.corrupt("json", "does not say how its latents were cut")
            cuts = encoded.latents
        crops = {}
        for name in self._reading.crops:
            entry = content["crops"][name]
            if "box" not in entry or (cuts is not None and name not in cuts):
                continue
            box = _box(entry["box"])
            width, height = map(int, entry["size"])
            if width < 1 or height < 1:
                raise ValueError(f"{entry['size']} is no size")
            face = in_crop(_box(content["bbox"]), box, (width, height))
            if cuts is not None:
                fit = cuts[name]
            elif data.buckets:
                fit = bucketed(name, (width, height), face, self._sizes)
            else:
                fit = random_square((width, height), face, data.resolution, (draws.x, draws.y))
            crops[name] = TargetCrop(box, (width, height), fit)
            if self._reading.target(name) not in raw.files:
                raise raw.corrupt(self._reading.target(name), "is missing")
        return crops


def _box(value: Any) -> list[float]:
    x0, y0, x1, y1 = map(float, value)
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"{value} is no box")
    return [x0, y0, x1, y1]
