"""The ledgers for the page's sliders: rows counted by which stops of each slider they pass.

At a stop the page counts what `replay` counts there, since a row's value lies on the same side of the stop as its cell.
"""

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.dataset.finished.replay import OFF, OUTCOMES, THRESHOLDS, Evidence
from pipeline.dataset.finished.report_numbers import MEASURES, positions
from schemas.arrays import Doubles
from stages.filter import QUALITIES, Quality, is_least
from stages.screen import SEEN_PX
from stages.settings import FilterSettings

_STOPS: dict[str, Sequence[float]] = {
    "min_image_px": (
        *(1, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 1792, 2048),
        *(2304, 2560, 3072, 4096),
    ),
    "max_pixels": [million * 10**6 for million in (1, 2, 4, 6, 8, 12, 16, 24, 32, 50, 64, 100, 150, 200, 300, 500)],
    "max_ai_marks": (0, 1),
    "max_second_score": [step / 20 for step in range(21)],
    "min_face_px": (
        *(0, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256, 288, 320, 384, 448, 512),
        *(640, 768, 1024),
    ),
}
"""Threshold of `filter` -> where its slider stops; the run's own comes to these. Others stop where bins begin."""
_MOST_STOPS = 24

_MERGE = 2_000_000
"""Cells of single ledgers that are held before they are added up."""

_MOST_CELLS = 500_000
"""In the page: to be no more, the sliders of qualities lose stops. Counts at the other stops stay exact."""

_ENDLESS = 1e300
"""Infinity in JSON."""

_OF_IMAGES = ("min_image_px", "max_pixels")


class Explorer:
    """Counts the rows of all ledgers in few cells, whatever their number."""

    def __init__(self, limits: FilterSettings, factor: int) -> None:
        self.limits, self.factor = limits, factor
        stops = {**{quality.key: _stops(quality) for quality in QUALITIES}, **_STOPS}
        self.stops = {key: sorted({*stops[key], getattr(limits, key)}) for key in THRESHOLDS}
        empty = dict.fromkeys((*THRESHOLDS, "outcome"), np.zeros(0, np.uint8))
        self._cells = [pa.table({**empty, "count": np.zeros(0, np.int64)})]
        self._held = 0

    def add(self, rows: Evidence) -> None:
        """Count rows. A bin is how many stops a value passes (of a least) or fails (of a most)."""
        columns: dict[str, Any] = {
            key: np.searchsorted(stops, rows.values[key], "right" if is_least(key) else "left").astype(np.uint8)
            for key, stops in self.stops.items()
        }
        ones = np.ones(len(rows.outcome), np.int64)
        self._cells.append(_summed(pa.table({**columns, "outcome": rows.outcome.astype(np.uint8), "count": ones})))
        self._held += self._cells[-1].num_rows
        if self._held > _MERGE:
            self._cells = [self._merged()]
            self._held = self._cells[0].num_rows

    def _merged(self) -> pa.Table:
        """All cells; while they are too many, the quality with the most stops loses every other."""
        cells = _summed(pa.concat_tables(self._cells))
        spare = {one.key: set(self.stops[one.key]) - {one.off, getattr(self.limits, one.key)} for one in QUALITIES}
        while cells.num_rows > _MOST_CELLS and any(spare.values()):
            key = max(spare, key=lambda key: len(spare[key]))
            given_up = sorted(spare[key])[::2]
            spare[key] -= set(given_up)
            stays = [stop not in given_up for stop in self.stops[key]]
            self.stops[key] = [stop for stop in self.stops[key] if stop not in given_up]
            bins = np.cumsum([0, *stays], dtype=np.uint8)[cells[key].to_numpy()]
            cells = _summed(cells.set_column(cells.column_names.index(key), key, pa.array(bins)))
        return cells

    def data(self) -> dict[str, Any]:
        """What the page reads: `cells` is a column of bytes per threshold and of outcomes, then of counts.

        They are sorted, deflated, and in base64.
        """
        merged = self._merged()
        cells = merged.sort_by([(name, "ascending") for name in merged.column_names])
        packed = [cells[name].to_numpy().astype("<u4" if name == "count" else np.uint8) for name in cells.column_names]
        measures = {key: one for one in MEASURES for key in one.thresholds}
        thresholds = [
            {
                "name": key,
                "reason": reason,
                "least": is_least(key),
                "stops": self.stops[key],
                "limit": getattr(self.limits, key),
                "off": OFF.get(key),
                "measure": measures[key].name if key in measures else "pixels",
                "marks": positions(measures[key], self.stops[key]) if key in measures else [],
            }
            for key, reason in THRESHOLDS.items()
        ]
        return {
            "thresholds": thresholds,
            "outcomes": OUTCOMES,
            "factor": self.factor,
            "seen_px": SEEN_PX,
            "rows": cells.num_rows,
            "cells": base64.b64encode(zlib.compress(b"".join(column.tobytes() for column in packed))).decode("ascii"),
        }


def _stops(quality: Quality) -> list[float]:
    """Where the slider of a quality stops: off, and at so many of the borders of its measure's bins."""
    (edges,) = (one.edges for one in MEASURES if one.name == quality.measure)
    borders = sorted({float(f"{edge:.3g}") for edge in edges.tolist()})
    inside = [stop for stop in borders if (stop > quality.off if quality.is_least else 0 < stop < quality.off)]
    step = -(-len(inside) // _MOST_STOPS)
    return [*inside[step - 1 :: step], quality.off]


def _summed(cells: pa.Table) -> pa.Table:
    """Equal cells as one, in the order in which they first come."""
    *names, count = cells.column_names
    sums = cells.group_by(names, use_threads=False).aggregate([(count, "sum")])
    return sums.select([*names, "count_sum"]).rename_columns(cells.column_names)


def distances(rows: Evidence, limits: FilterSettings) -> Doubles:
    """(N,) how far each face is from the nearest threshold, as a share of it; infinite: no threshold judges it.

    Sizes of images do not count: nobody has to look whether 1,023 pixels are too few.
    """
    nearest: Doubles = np.full(len(rows.outcome), np.inf)
    for key, values in rows.values.items():
        limit = getattr(limits, key)
        if key not in _OF_IMAGES and limit != OFF.get(key):
            known = np.isfinite(values) & (values > 0)
            nearest = np.where(known, np.minimum(nearest, abs(values / (limit or 1) - 1)), nearest)
    return nearest


def row_data(rows: Evidence, number: int) -> list[float]:
    """The evidence of one row as the page reads it: its values in the order of the thresholds, and its outcome."""
    values = [float(column[number]) for column in rows.values.values()]
    return [*np.clip(values, -_ENDLESS, _ENDLESS).tolist(), int(rows.outcome[number])]
