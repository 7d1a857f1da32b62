"""Curves over the steps of a training: read from RUN/metrics.jsonl, thinned, and drawn as SVG."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from matplotlib.ticker import MaxNLocator
from pyarrow.json import ReadOptions, read_json
from scipy.ndimage import uniform_filter1d

from schemas.arrays import Doubles, Mask
from schemas.arrow import spare_pandas
from schemas.errors import OutputError, first_line

spare_pandas()  # a training has no other arrays of Arrow

Metrics = Mapping[str, Doubles]
"""Name -> values (lines,), NaN where a line has no finite one; `step` is among them."""

POINTS = 240
WIDTH, HEIGHT = 1000, 100
"""Of the drawing, which is stretched."""
_FEW = 40
"""Up to so many points are drawn as dots too."""
_SMOOTH = 12
"""Points that the smooth line averages over."""
_LOGARITHMIC = 30
"""From this ratio of the largest to the smallest value on."""


def number(value: float) -> str:
    """Three digits, more of large numbers."""
    return f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def percent(value: float) -> str:
    return f"{round(100 * value, 1):g} %"


class Kind(NamedTuple):
    """How the curve of a metric is drawn."""

    title: str
    low: float | None = None
    high: float | None = None
    """The axis; where it is None, it goes by the values."""
    smooth: bool = False
    words: Callable[[float], str] = number
    levels: Mapping[str, str] = MappingProxyType({})
    """Metrics that are drawn into it as lines, since they do not change -> what they are."""


_REAL = {"id_same_person": "two real photos of a person", "id_strangers": "strangers"}
KINDS = {
    "loss": Kind("Loss", smooth=True),
    "id_similarity": Kind("ID similarity of the validation images", 0, levels=_REAL),
    "id_to_others": Kind("ID similarity to other photos of the person", 0, levels=_REAL),
    **{
        f"copy_paste_{space}": Kind(f"Copy-paste by {how}: 1 is the condition's photo", -1, 1)
        for space, how in {"id": "ID", "pose": "pose", "pixels": "pixels", "clip": "CLIP"}.items()
    },
    "clip_similarity": Kind("CLIP similarity to the prompt"),
    "faces_found": Kind("Validation images that show a face", 0, 1, words=percent),
    "samples_per_s": Kind("Samples per second", 0),
    "data_wait": Kind("Share of the time spent waiting for data", 0, 1, words=percent),
    "lr": Kind("Learning rate", 0),
    "grad_norm": Kind("Norm of the gradient, before it is clipped", smooth=True),
}
"""Metric -> how it is drawn, in this order; whatever else is written down comes after, under its own name."""
_NOT_DRAWN = ("step", "epoch", "seconds", *_REAL)
_EACH_STEP = ("loss", "grad_norm")


def read_metrics(path: Path) -> dict[str, Doubles]:
    """All numbers of a run; nothing where none is written yet. A torn last line is left out.

    Raises:
        OutputError: when the file is damaged.
    """
    try:
        lines = path.read_bytes() if path.exists() else b""
        lines = lines[: lines.rfind(b"\n") + 1]
        table = read_json(BytesIO(lines), ReadOptions(use_threads=False)) if lines else pa.table({"step": []})
        steps = table["step"].cast(pa.float64()).to_numpy()
    except (OSError, LookupError, pa.ArrowException) as error:
        raise OutputError(f"{path} cannot be read ({first_line(error)}): --resume mends it.") from error
    numbers = {
        column: table[column].cast(pa.float64()).to_numpy()
        for column in table.column_names
        if any(is_such(table[column].type) for is_such in (pa.types.is_integer, pa.types.is_floating, pa.types.is_null))
    }
    return {**numbers, "step": steps}


def not_finite(name: str, metrics: Metrics) -> Mask:
    """(lines,) Whether a step was logged whose value was not finite; false for what not every step has."""
    steps = metrics.get("lr", metrics["step"]) >= 0
    return np.asarray(steps & np.isnan(metrics[name]) if name in _EACH_STEP and name in metrics else steps & False)


class Thinned(NamedTuple):
    """A curve of few points, each of which stands for the lines of as many steps; all arrays are (N,)."""

    first: Doubles
    last: Doubles
    """Steps that a point stands for."""
    low: Doubles
    mean: Doubles
    high: Doubles
    lines: Doubles


def thinned(steps: Doubles, values: Doubles) -> Thinned:
    """Lowest, mean and highest value of at most POINTS stretches of steps; not finite ones do not count."""
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if not len(steps):
        return Thinned(*[np.zeros(0)] * 6)
    at = np.ceil(steps * (POINTS / max(steps.max(), 1)))
    starts = np.flatnonzero(np.diff(at, prepend=-1))
    ends = np.append(starts[1:], len(at)) - 1
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    lines = (ends + 1 - starts).astype(np.float64)
    return Thinned(steps[starts], steps[ends], low, np.add.reduceat(values, starts) / lines, high, lines)


@dataclass(frozen=True)
class Chart:
    name: str
    title: str
    about: str
    """In words."""
    ticks: list[tuple[float, str]]
    """How far down, and what, from the top."""
    band: str
    line: str
    smooth: str
    dots: str
    """Paths; the latter two may be empty."""
    spans: list[tuple[float, float, str]]
    """Where a point begins, how wide it is, and what it stands for in words."""
    levels: list[tuple[float, str]]
    """How far down a line is drawn, and what it stands for in words."""
    lost: list[tuple[float, float]]
    """Where steps begin and how wide they are whose value was not finite."""


def charts(metrics: Metrics, last: int) -> Iterator[Chart]:
    """A chart of each metric that has a value, over the steps from 0 to `last`."""
    others = {name: Kind(name.replace("_", " ")) for name in metrics if name not in (*KINDS, *_NOT_DRAWN)}
    for name, kind in {**KINDS, **others}.items():
        if name in metrics and (curve := thinned(metrics["step"], metrics[name])).mean.size:
            yield _chart(name, kind, curve, metrics, last)


def _chart(name: str, kind: Kind, curve: Thinned, metrics: Metrics, last: int) -> Chart:
    known = {
        words: metrics[level][np.isfinite(metrics[level])] for level, words in kind.levels.items() if level in metrics
    }
    levels = {words: float(values[-1]) for words, values in known.items() if len(values)}
    low, high = min([float(curve.mean.min()), *levels.values()]), max([float(curve.mean.max()), *levels.values()])
    is_log = kind.low is None and low > 0 and high / low > _LOGARITHMIC
    if is_log:
        first, end = np.floor(np.log10(low)), np.ceil(np.log10(high))
        stride = np.ceil((end - first) / 5)
        axis = 10 ** np.arange(first, end + stride, stride)
    else:
        spare = (low == high) * (abs(high) / 2 or 1)
        bottom = low - spare if kind.low is None else min(kind.low, low)
        ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(bottom, kind.high or high + spare)
        axis = np.asarray(ticks)
    scale = np.log if is_log else np.asarray

    def down(values: Doubles) -> Doubles:
        bottom, top = scale(axis[[0, -1]])
        with np.errstate(all="ignore"):
            shares = np.nan_to_num((scale(values) - bottom) / (top - bottom), nan=0, posinf=1, neginf=0)
        return np.asarray(HEIGHT * (1 - np.clip(shares, 0, 1)))

    def across(steps: Doubles) -> Doubles:
        return WIDTH * steps / max(last, 1)

    x, y = across((curve.first + curve.last) / 2), down(curve.mean)
    ends = np.append((x[1:] + x[:-1]) / 2, WIDTH)
    words = [
        f"step {first:,.0f}{'' if first == end else f' to {end:,.0f}'}: {kind.words(mean)}"
        + ("" if lines == 1 else f" ({kind.words(least)} to {kind.words(most)})")
        for first, end, least, mean, most, lines in zip(*curve, strict=True)
    ]
    lost = metrics["step"][not_finite(name, metrics)]
    gone = thinned(lost, lost)
    about = f"{kind.words(curve.mean[0])} throughout"
    if curve.low.min() != curve.high.max():
        about = (
            f"from {kind.words(curve.mean[0])} to {kind.words(curve.mean[-1])}, lowest {kind.words(curve.low.min())}, "
            f"highest {kind.words(curve.high.max())}{', on a logarithmic axis' if is_log else ''}"
        )
    return Chart(
        name=name,
        title=kind.title,
        about=about,
        ticks=[(float(at), kind.words(value)) for at, value in zip(down(axis), axis, strict=True)][::-1],
        band=_path(np.append(x, x[::-1]), down(np.append(curve.high, curve.low[::-1]))) + "z",
        line=_path(x, y),
        smooth=_path(x, uniform_filter1d(y, _SMOOTH, mode="nearest")) if kind.smooth and len(x) > _FEW else "",
        dots="".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x, y, strict=True)) if len(x) <= _FEW else "",
        spans=[(round(a, 1), round(b - a, 1), text) for a, b, text in zip([0, *ends[:-1]], ends, words, strict=True)],
        levels=[(float(down(np.array(value))), f"{words} {kind.words(value)}") for words, value in levels.items()],
        lost=[(a, b - a + WIDTH / POINTS) for a, b in zip(across(gone.first), across(gone.last), strict=True)],
    )


def _path(x: Doubles, y: Doubles) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))
