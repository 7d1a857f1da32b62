"""Detect: measures the faces of a photo. It judges nothing; see stages.filter."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import local
from typing import Any

import numpy as np

from schemas.arrays import Image
from stages.base import BatchStage
from stages.filter import from_points
from stages.models.backends import Faces, backend
from stages.models.boxes import apart, areas
from stages.pixels.headers import UNDECODABLE
from stages.pixels.images import photo_of
from stages.runtime import Runtime
from stages.settings import Settings

_GPU_BATCH = 16
"""Photos that a thread decodes before they are looked at; the detector's own batches take from several threads."""


class _OfThread(local):
    """A detector for each thread: those that take one photo at a time keep a state of it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.detector = make()


class Detect(BatchStage):
    """Counts the faces of a photo by the configured detector, and measures the largest."""

    name = "detect"
    reads = ("image", "sha256", "screen_points")
    writes = ("n_faces", "bbox", "kps", "det_score", "face_px", "second_score", "yaw_deg", "pitch_deg", "eye_px")
    drops = UNDECODABLE

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        super().__init__(settings, runtime)
        make = backend("detector", settings.models.detector)
        self._own = _OfThread(partial(make, settings.models, runtime.device))
        self._detector: Any = self._own.detector
        if runtime.device == "cuda" and hasattr(self._detector, "detect_all"):
            self.batch = _GPU_BATCH

    def given(self, record: Mapping[str, Any]) -> tuple[Image, Any]:
        return photo_of(record), record["screen_points"]

    def computed(self, given: Sequence[tuple[Image, Any]]) -> Sequence[Faces]:
        if hasattr(self._detector, "detect_all"):
            faces: Sequence[Faces] = self._detector.detect_all(*zip(*given, strict=True)) if given else ()
            return faces
        return [self._own.detector.detect(image) for image, _ in given]

    def written(self, record: Mapping[str, Any], output: Faces) -> dict[str, Any]:
        return measure(output, self.settings.models.det_thresh)


def measure(faces: Faces, det_thresh: float) -> dict[str, Any]:
    """The columns that `Detect` writes, from the detections of one photo (a score is a face from det_thresh on).

    `second_score` is the best score, however low, of a box that is not the largest face seen a second time: boxes
    that overlap it, or lie with their centre in it, do not count.
    """
    certain = np.flatnonzero(faces.score >= det_thresh)
    if certain.size == 0:
        return {"n_faces": 0, "second_score": float(faces.score.max(initial=0))}
    main = int(certain[np.argmax(areas(faces.bbox[certain]))])
    box = faces.bbox[main]
    others = apart(faces.bbox, box)
    others[main] = False
    yaw, pitch, _, eye_px = from_points(faces.kps[[main]].astype(np.float64))[:, 0].tolist()
    return {
        "n_faces": int(certain.size),
        "bbox": box.tolist(),
        "kps": faces.kps[main].tolist(),
        "det_score": float(faces.score[main]),
        "face_px": float(min(box[2] - box[0], box[3] - box[1])),
        "second_score": float(faces.score[others].max(initial=0)),
        "yaw_deg": None if np.isnan(yaw) else yaw,  # of points that `filter` drops
        "pitch_deg": None if np.isnan(pitch) else pitch,
        "eye_px": eye_px,
    }
