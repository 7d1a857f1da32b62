"""The ledgers for the page's sliders: rows counted by which stops of each slider they pass.

At a stop the page counts what `replay` counts there, since a row's value lies on the same side of the stop as its cell.
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.dataset.finished.replay import OUTCOMES, Evidence, Floats
from pipeline.dataset.finished.report_numbers import MEASURES, positions
from stages.screen import SEEN_PX
from stages.settings import FilterSettings

_STOPS: dict[str, Sequence[float]] = {
    "min_image_px": (
        *(1, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 1792, 2048),
        *(2304, 2560, 3072, 4096),
    ),
    "max_pixels": [million * 10**6 for million in (1, 2, 4, 6, 8, 12, 16, 24, 32, 50, 64, 100, 150, 200, 300, 500)],
    "max_second_score": [step / 20 for step in range(21)],
    "min_face_px": (
        *(0, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256, 288, 320, 384, 448, 512),
        *(640, 768, 1024),
    ),
}
"""Threshold of `filter` -> where its slider stops, in the order in which they decide; the run's own comes to these."""

_MERGE = 2_000_000
"""Cells of single ledgers that are held before they are added up."""

_ENDLESS = 1e300
"""Infinity in JSON."""

Numbers = npt.NDArray[np.int64]


class Explorer:
    """Counts the rows of all ledgers in few cells, whatever their number."""

    def __init__(self, limits: FilterSettings, factor: int) -> None:
        """Take the thresholds of the run, and what its screen had reduced photos by."""
        self.limits, self.factor = limits, factor
        self.stops = {name: sorted({*stops, getattr(limits, name)}) for name, stops in _STOPS.items()}
        self._cells: list[tuple[Numbers, Numbers]] = []

    def add(self, rows: Evidence) -> None:
        """Count rows."""
        cells = rows.outcome.astype(np.int64)
        for bins, stops in zip(self._bins(rows), self.stops.values(), strict=True):
            cells = cells * (len(stops) + 1) + bins
        self._cells.append(np.unique(cells, return_counts=True))
        if sum(len(one) for one, _ in self._cells) > _MERGE:
            self._cells = [self._merged()]

    def _bins(self, rows: Evidence) -> tuple[npt.NDArray[np.intp], ...]:
        """(N,) each: how many stops a value passes (of a least) or fails (of a most); these come first."""
        stops = {name: np.array(values, np.float64) for name, values in self.stops.items()}
        return (
            np.searchsorted(stops["min_image_px"], rows.side, "right"),
            np.searchsorted(stops["max_pixels"], rows.pixels, "left"),
            np.searchsorted(stops["max_second_score"], rows.second, "left"),
            np.searchsorted(stops["min_face_px"], rows.face, "right"),
        )

    def _merged(self) -> tuple[Numbers, Numbers]:
        if not self._cells:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        cells, indices = np.unique(np.concatenate([one for one, _ in self._cells]), return_inverse=True)
        counts = np.zeros(len(cells), np.int64)
        np.add.at(counts, indices, np.concatenate([count for _, count in self._cells]))
        return cells, counts

    def data(self) -> dict[str, Any]:
        """What the page reads: `cells` is base64 of a column of bytes per threshold and of outcomes, then of counts."""
        cells, counts = self._merged()
        columns = []
        for stops in reversed(self.stops.values()):
            cells, bins = np.divmod(cells, len(stops) + 1)
            columns.append(bins.astype(np.uint8))
        packed = [*reversed(columns), cells.astype(np.uint8), counts.astype("<u4")]
        return {
            "names": list(self.stops),
            "stops": self.stops,
            "limits": {name: getattr(self.limits, name) for name in self.stops},
            "outcomes": OUTCOMES,
            "factor": self.factor,
            "seen_px": SEEN_PX,
            "marks": {one.name: positions(one, self.stops[one.threshold]) for one in MEASURES if one.threshold},
            "rows": len(counts),
            "cells": base64.b64encode(b"".join(column.tobytes() for column in packed)).decode("ascii"),
        }


def distances(rows: Evidence, limits: FilterSettings) -> Floats:
    """(N,) how far each face is from the nearest threshold, as a share of it; infinite: no threshold judges it.

    Sizes of images do not count: nobody has to look whether 1,023 pixels are too few.
    """
    judged = (rows.second, limits.max_second_score), (rows.face, limits.min_face_px)
    known = [
        np.where(np.isfinite(column) & (column > 0), abs(column / (limit or 1) - 1), np.inf) for column, limit in judged
    ]
    nearest: Floats = np.minimum(*known)
    return nearest


def row_data(rows: Evidence, number: int) -> list[float]:
    """The evidence of one row as the page reads it: its values in the order of the thresholds, and its outcome."""
    values = [float(column[number]) for column in (rows.side, rows.pixels, rows.second, rows.face)]
    return [*np.clip(values, -_ENDLESS, _ENDLESS).tolist(), int(rows.outcome[number])]
