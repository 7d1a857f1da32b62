"""Filter: judges the measurements of `detect`. Numbers in, verdict out: no pixels, no model."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from schemas.drops import DropReason
from stages.base import Dropped, RowStage
from stages.settings import FilterSettings

_MIN_EYE_DISTANCE = 0.05
"""Share of the long side of the face box; over 70 faces of SCRFD it was 0.13 to 0.40, median 0.33."""
_MIN_SPREAD = 0.05
"""Extent of the five points across their main direction / along it; over the same faces 0.47 to 0.99."""


class Filter(RowStage):
    """Keeps photos with exactly one face that is large enough."""

    name: ClassVar[str] = "filter"
    reads: ClassVar[tuple[str, ...]] = ("n_faces", "bbox", "kps", "face_px", "second_score")
    writes: ClassVar[tuple[str, ...]] = ()
    drops: ClassVar[tuple[DropReason, ...]] = (
        DropReason.NO_FACE,
        DropReason.SEVERAL_FACES,
        DropReason.SMALL_FACE,
        DropReason.BAD_LANDMARKS,
    )

    def row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        reason = judge(record, self.settings.filter)
        if reason is not None:
            raise Dropped(reason)
        return {}


def judge(record: Mapping[str, Any], limits: FilterSettings) -> DropReason | None:
    """Why a row with these measurements is dropped, or None for one to keep; the same from a stage or a ledger.

    Comparisons are written so that a missing or undefined (NaN) measurement drops the row: it proves nothing.
    """
    n_faces, face_px, second_score = record["n_faces"], record["face_px"], record["second_score"]
    if not n_faces:
        return DropReason.NO_FACE
    if n_faces > 1 or second_score is None or not second_score <= limits.max_second_score:
        return DropReason.SEVERAL_FACES
    if face_px is None or not face_px >= limits.min_face_px:
        return DropReason.SMALL_FACE
    return None if spans_a_face(record["bbox"], record["kps"]) else DropReason.BAD_LANDMARKS


def spans_a_face(bbox: npt.ArrayLike | None, kps: npt.ArrayLike | None) -> bool:
    """Whether five points (5, 2) can be aligned: finite, eyes apart, not all on one line; the box is (4,), xyxy."""
    if bbox is None or kps is None:
        return False
    box, points = np.asarray(bbox, np.float64), np.asarray(kps, np.float64)
    if not (np.isfinite(box).all() and np.isfinite(points).all()):
        return False
    long_side, eye_distance = (box[2:] - box[:2]).max(), np.hypot(*(points[1] - points[0]))
    if long_side <= 0 or eye_distance < _MIN_EYE_DISTANCE * long_side:
        return False
    along, across = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)
    return bool(across >= _MIN_SPREAD * along)
