"""Filter: judges the measurements of `detect`. Numbers in, verdict out: no pixels, no model.

QUALITIES are thresholds on how good a face is, a line each, which stages, `replay` and the sliders of the report judge.
One more is a line there, its reason in `schemas.drops`, its key in `FilterSettings` with a default that lets everything
pass, a call of `require` in the stage that measures it, and for a new measure its bins in `MEASURES` of the report's
`report_numbers` and some values in `some_qualities` of tests/judged_rows.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.arcface import pose
from schemas.arrays import Doubles
from schemas.drops import Dropped, DropReason
from stages.base import RowStage
from stages.settings import FilterSettings

_MIN_EYE_DISTANCE = 0.05
"""Share of the long side of the face box; over 70 faces of SCRFD it was 0.13 to 0.40, median 0.33."""
_MIN_SPREAD = 0.05
"""Extent of the five points across their main direction / along it; over the same faces 0.47 to 0.99."""


def is_least(key: str) -> bool:
    """Whether a threshold is the least that may be, or the most."""
    return not key.startswith("max_")


@dataclass(frozen=True)
class Quality:
    key: str
    """Of `filter`: `max_…` is the most, all others the least. Its default is no threshold."""
    measure: str
    """A column of the ledger, or a name in FROM_POINTS."""
    reason: DropReason
    stage: str
    """That judges it."""

    @property
    def is_least(self) -> bool:
        return is_least(self.key)

    @property
    def off(self) -> float:
        """The threshold that lets everything pass."""
        return float(FilterSettings.model_fields[self.key].default)


POSE = ("yaw", "pitch", "roll")
"""Angles, in the order of `pose`."""
FROM_POINTS = (*POSE, "eye_px")
"""What is no column of its own, but comes of `kps`, in the order of `from_points`."""

QUALITIES = (
    Quality("min_det_score", "det_score", DropReason.LOW_DET_SCORE, "filter"),
    Quality("max_yaw", "yaw", DropReason.LARGE_YAW, "filter"),
    Quality("max_pitch", "pitch", DropReason.LARGE_PITCH, "filter"),
    Quality("max_roll", "roll", DropReason.LARGE_ROLL, "filter"),
    Quality("min_eye_px", "eye_px", DropReason.FEW_EYE_PIXELS, "filter"),
    Quality("min_jpeg_quality", "jpeg_quality", DropReason.LOW_JPEG_QUALITY, "filter"),
    Quality("max_ai_marks", "ai_mark", DropReason.AI_MARKED, "filter"),
    Quality("min_sharpness", "sharpness", DropReason.BLURRED, "align"),
    Quality("min_brightness", "brightness", DropReason.TOO_DARK, "align"),
    Quality("max_brightness", "brightness", DropReason.TOO_BRIGHT, "align"),
    Quality("max_occlusion", "occlusion", DropReason.OCCLUDED, "segment"),
    Quality("min_embedding_norm", "embedding_norm", DropReason.WEAK_EMBEDDING, "embed_face"),
    Quality("min_fiqa", "fiqa", DropReason.LOW_FIQA, "embed_face"),
    Quality("photo", "photo", DropReason.NOT_A_PHOTO, "embed_image"),
    Quality("min_aesthetic", "aesthetic", DropReason.LOW_AESTHETIC, "embed_image"),
    Quality("max_nsfw", "nsfw_score", DropReason.NSFW, "embed_image"),
)
"""In the order in which they decide: that of the stages."""


def reasons(stage: str) -> tuple[DropReason, ...]:
    """Those that a stage drops by."""
    return tuple(quality.reason for quality in QUALITIES if quality.stage == stage)


class Filter(RowStage):
    """Keeps photos with exactly one face that is large enough, and good enough where thresholds are set."""

    name = "filter"
    reads = ("n_faces", "bbox", "kps", "face_px", "second_score", "det_score", "jpeg_quality", "ai_mark")
    writes = ()
    drops = (
        DropReason.NO_FACE,
        DropReason.SEVERAL_FACES,
        DropReason.SMALL_FACE,
        DropReason.BAD_LANDMARKS,
        *reasons("filter"),
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
    if not spans_a_face(record["bbox"], record["kps"]):
        return DropReason.BAD_LANDMARKS
    return poor(Filter.name, record, limits)


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


def poor(stage: str, measured: Mapping[str, Any], limits: FilterSettings) -> DropReason | None:
    """The first threshold of a stage that is on and not met. What is missing or undefined meets none.

    Numbers count as ledgers hold them, in single precision; of angles their size does, whatever the side; a text
    counts as one unless it is empty.
    """
    for quality in QUALITIES:
        limit = getattr(limits, quality.key)
        if quality.stage != stage or limit == quality.off:
            continue
        if quality.measure in FROM_POINTS:
            points = np.array([measured["kps"]], np.float64)
            value = abs(from_points(points)[FROM_POINTS.index(quality.measure)][0])
        else:
            value = measured[quality.measure]
        if isinstance(value, str):
            value = value != ""
        number = np.nan if value is None else float(np.float32(value))
        if not (number >= limit if quality.is_least else number <= limit):
            return quality.reason
    return None


def require(stage: str, measured: Mapping[str, Any], limits: FilterSettings) -> None:
    """Drop a row, with what was measured, where `poor` has a reason."""
    reason = poor(stage, measured, limits)
    if reason is not None:
        raise Dropped(reason, **measured)


def unused(limits: FilterSettings) -> set[str]:
    """The keys of thresholds that are off."""
    return {quality.key for quality in QUALITIES if getattr(limits, quality.key) == quality.off}


def from_points(kps: Doubles) -> Doubles:
    """(4, N): yaw, pitch and roll as `pose` has them, and the distance of the eyes, of five points (N, 5, 2)."""
    return np.stack([*pose(kps), np.hypot(*(kps[:, 1] - kps[:, 0]).T)])
