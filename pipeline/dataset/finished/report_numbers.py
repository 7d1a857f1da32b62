"""What the report counts of the ledgers: distributions of all that was measured, and hosts by what became of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.finished.replay import floats, points, posed
from schemas.arrays import Doubles, Integers
from schemas.columns import CROPS, KEPT, LEDGER
from schemas.drops import DropReason
from stages.download import Download
from stages.filter import POSE, QUALITIES
from stages.metadata import Metadata

_CAPTIONS = {"captions": "caption_chars", "further captions": "further_chars"}

_MOST_HOSTS = 200_000
_HOST = r"^\s*[A-Za-z]+://(?:[^/?#@]*@)?(?P<host>[^/?#:]+)"

FATES = ("kept", "dropped later", "failed", "refused", "not tried")
_REFUSALS = (
    *(DropReason.ACCESS_DENIED, DropReason.RATE_LIMITED, DropReason.OPTED_OUT, DropReason.ROBOTS_TXT),
    DropReason.FORBIDDEN_ADDRESS,
)
_ARRIVED = (DropReason.SMALL_IMAGE, DropReason.NOT_AN_IMAGE)


def _even(low: float, high: float, count: int) -> Doubles:
    return np.linspace(low, high, count + 1)


def _doubling(low: float, high: float, per_octave: int = 4) -> Doubles:
    return np.geomspace(low, high, int(np.log2(high / low)) * per_octave + 1)


_YES_NO = "yes or no"
"""The unit of what is 0 or 1."""


@dataclass(frozen=True)
class Measure:
    """One measurement, and the bins that it is counted in; what lies outside counts in the outermost."""

    name: str
    title: str
    unit: str
    edges: Doubles
    """(bins + 1,), ascending."""
    threshold: str = ""
    """The key of `filter` that judges it, beside those of `stages.filter`."""

    @property
    def is_signed(self) -> bool:
        """Whether thresholds judge its size on either side of zero, the middle of the axis."""
        return self.name in POSE

    @property
    def thresholds(self) -> list[str]:
        """All keys of `filter` that judge it."""
        return [*filter(None, [self.threshold]), *(one.key for one in QUALITIES if one.measure == self.name)]


MEASURES = (
    Measure("image_px", "Short side of the image", "px", _doubling(128, 8192), "min_image_px"),
    Measure("face_px", "Short side of the face", "px", _doubling(8, 2048), "min_face_px"),
    Measure("face_share", "Height of the face / of the image", "", _even(0, 1, 40)),
    Measure("det_score", "Score of the face", "", _even(0, 1, 40)),
    Measure("second_score", "Score of a second face", "", _even(0, 1, 40), "max_second_score"),
    Measure("yaw", "Yaw, from the five points", "°", _even(-90, 90, 36)),
    Measure("pitch", "Pitch, from the five points", "°", _even(-90, 90, 36)),
    Measure("roll", "Roll", "°", _even(-90, 90, 36)),
    Measure("eye_px", "Distance of the eyes", "px", _doubling(4, 1024)),
    Measure("jpeg_quality", "Quality of the JPEG file (100: or another format)", "", _even(0, 100, 40)),
    Measure("ai_mark", "Says that a model made it", _YES_NO, _even(0, 1, 2)),
    Measure("sharpness", "Sharpness of the face crop", "", _doubling(1, 16384, 3)),
    Measure("brightness", "Brightness of the face crop", "", _even(0, 255, 34)),
    Measure("mask_share", "Share of the face crop in the mask", "", _even(0, 1, 40)),
    Measure("occlusion", "Share of the face that is covered", "", _even(0, 1, 40)),
    Measure("embedding_norm", "Norm of the face embedding", "", _doubling(1, 256)),
    Measure("fiqa", "Quality of the face for recognition", "", _even(0, 1, 40)),
    Measure("photo", "Probability of a photo, not of art", "", _even(0, 1, 40)),
    Measure("aesthetic", "Aesthetic score", "", _even(0, 10, 40)),
    Measure("nsfw_score", "Score of not being safe for work", "", _even(0, 1, 40)),
    Measure("caption_chars", "Length of the caption, where there is one", "characters", _doubling(1, 2048, 3)),
)


COLUMNS = (
    *("url", "source_kind", "stage", "width", "height", "bbox", "kps", "further_chars", "crops_made"),
    *(one.name for one in MEASURES if one.name in LEDGER),
)
"""Columns of the ledger, beside the verdict, that are counted."""


def measured(ledger: pa.Table) -> dict[str, Doubles]:
    """Measure -> its values (N,) in these rows; NaN where it was not measured."""
    values = {one.name: floats(ledger[one.name]) for one in MEASURES if one.name in COLUMNS}
    values["caption_chars"] = np.where(values["caption_chars"] > 0, values["caption_chars"], np.nan)
    width, height = (floats(ledger[name]) for name in ("width", "height"))
    known = pc.and_(pc.is_valid(ledger["kps"]), pc.is_valid(ledger["bbox"])).to_numpy()
    boxes = points(ledger["bbox"].filter(pa.array(known)).combine_chunks()).reshape(-1, 4)
    share = np.full(len(known), np.nan)
    share[known] = (boxes[:, 3] - boxes[:, 1]) / height[known]
    return values | {"image_px": np.minimum(width, height), "face_share": share} | posed(ledger["kps"], known)


def _holds(lists: pa.ListArray, word: str) -> Doubles:
    """(N,) 1 where a list holds a word, 0 where it does not, NaN where there is none."""
    held = np.where(lists.is_valid().to_numpy(zero_copy_only=False), 0, np.nan)
    held[pc.list_parent_indices(lists).filter(pc.equal(pc.list_flatten(lists), word)).to_numpy()] = 1
    return held


def fates(ledger: pa.Table) -> Integers:
    """(N,) numbers in FATES."""
    stage, verdict = ledger["stage"], ledger["verdict"]
    fetching = pc.equal(stage, Download.name).to_numpy()
    at = np.full(ledger.num_rows, FATES.index("dropped later"))
    at[fetching & ~pc.is_in(verdict, pa.array(map(str, _ARRIVED))).to_numpy()] = FATES.index("failed")
    at[fetching & pc.is_in(verdict, pa.array(map(str, _REFUSALS))).to_numpy()] = FATES.index("refused")
    at[pc.equal(stage, Metadata.name).to_numpy()] = FATES.index("not tried")
    at[pc.equal(verdict, KEPT).to_numpy()] = FATES.index("kept")
    return at


class Numbers:
    def __init__(self) -> None:
        self.histograms = {one.name: np.zeros((2, len(one.edges) - 1), np.int64) for one in MEASURES}
        """Measure -> (2, bins): kept rows, dropped rows."""
        self.hosts: dict[str, Integers] = {}
        """Host -> (FATES,) rows; of very many hosts, those with the most rows."""
        self.given = {name: np.zeros((2, 2), np.int64) for name in (*_CAPTIONS, *CROPS)}
        """What rows may have -> (2, 2): of the kept those that have it, and of which it is known; of the dropped."""
        self.made = 0
        """Kept rows whose images a model made."""

    def add(self, ledger: pa.Table) -> None:
        """Count the rows of a ledger, which has COLUMNS and verdicts."""
        kept, values = pc.equal(ledger["verdict"], KEPT).to_numpy(), measured(ledger)
        for name, edges in ((measure.name, measure.edges) for measure in MEASURES):
            known, bins = np.isfinite(values[name]), len(edges) - 1
            at = np.clip(np.searchsorted(edges, values[name][known], "right") - 1, 0, bins - 1)
            sums = np.bincount(np.where(kept[known], at, at + bins), minlength=2 * bins)
            self.histograms[name] += sums.reshape(2, bins)
        self.made += pc.sum(pc.and_(pa.array(kept), pc.equal(ledger["source_kind"], "made"))).as_py() or 0
        lengths = {name: floats(ledger[column]) for name, column in _CAPTIONS.items()}
        given = {name: np.where(np.isfinite(chars), chars > 0, np.nan) for name, chars in lengths.items()}
        given |= {name: _holds(ledger["crops_made"].combine_chunks(), name) for name in CROPS}
        for name, has in given.items():
            self.given[name] += [[int(np.nansum(has[one])), np.isfinite(has[one]).sum()] for one in (kept, ~kept)]
        hosts = pc.utf8_lower(pc.struct_field(pc.extract_regex(ledger["url"], _HOST), "host"))
        table = pa.table({"host": hosts, "fate": fates(ledger)}).filter(pc.is_valid(hosts))
        for group in table.group_by(["host", "fate"]).aggregate([([], "count_all")]).to_pylist():
            rows = self.hosts.setdefault(group["host"], np.zeros(len(FATES), np.int64))
            rows[group["fate"]] += group["count_all"]
        if len(self.hosts) > _MOST_HOSTS:
            self.hosts = self.largest_hosts(_MOST_HOSTS // 2)

    def largest_hosts(self, count: int) -> dict[str, Integers]:
        """The hosts with the most rows, in this order."""
        ranked = sorted(self.hosts, key=lambda host: (-int(self.hosts[host].sum()), host))
        return {host: self.hosts[host] for host in ranked[:count]}


def positions(measure: Measure, values: Sequence[float]) -> list[float]:
    """Where values lie on the axis of a measure, 0..1."""
    shares = np.linspace(0, 1, len(measure.edges))
    return [round(float(np.interp(value, measure.edges, shares)), 4) for value in values]


def charts(histograms: Mapping[str, Integers]) -> Iterator[dict[str, Any]]:
    """The distributions of all measures of which there is any, as the page draws them.

    `bars` are, per bin, kept rows / most kept rows of a bin, the same of dropped rows, and both in words; `about` has
    the medians of kept and of dropped rows, to the width of a bin; `ticks` beginning, middle and end of the axis.
    """
    for measure in MEASURES:
        counts = histograms[measure.name]
        totals = dict(zip(("kept", "dropped"), counts.sum(axis=1).tolist(), strict=True))
        if not any(totals.values()):
            continue
        heights = counts / np.maximum(counts.max(axis=1, keepdims=True), 1)
        low, *_, high = steps = [_with_unit(measure, edge) for edge in measure.edges]
        spans, ticks = [f"{low} to {high}" for low, high in pairwise(steps)], (low, steps[len(steps) // 2], high)
        amounts, what = [_median(measure, row) for row in counts], "median "
        if measure.unit == _YES_NO:
            spans, ticks, amounts, what = ["no", "yes"], ("no", "", "yes"), [f"{row[1]:,}" for row in counts], "yes: "
        bars = [
            (float(up), float(down), f"{span}: {one:,} kept, {other:,} dropped")
            for (up, down), (one, other), span in zip(heights.T, counts.T.tolist(), spans, strict=True)
        ]
        about = [
            f"{amount} of {total:,} {name}"
            for amount, (name, total) in zip(amounts, totals.items(), strict=True)
            if total
        ]
        yield {
            **{"measure": measure, "bars": bars, "about": what + ", ".join(about)},
            "ticks": [tick.removesuffix(" characters") for tick in ticks],
        }


def _median(measure: Measure, counts: Integers) -> str:
    at = int(np.searchsorted(counts.cumsum(), counts.sum() / 2))
    if at == 0:  # most often all are 0, which the middle of the bin would not say
        return f"under {_with_unit(measure, measure.edges[1])}"
    return _with_unit(measure, (measure.edges[at] + measure.edges[at + 1]) / 2)


def _with_unit(measure: Measure, value: float) -> str:
    digits = 0 if measure.unit or abs(value) >= 10 or value == round(value) else 2
    return f"{value:,.{digits}f}{'' if measure.unit == '°' else ' '}{measure.unit}".strip()
