"""Segment: which part of the face crop is skin, hair, background. Parsed on a wider crop, warped onto the face crop."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from schemas.arrays import Floats, Image, Labels
from schemas.drops import Dropped, DropReason
from stages.align import FACE_SIZE
from stages.base import BatchStage
from stages.filter import reasons, require
from stages.models.backends import backend
from stages.pixels.geometry import ffhq_crop, ffhq_matrix, inside_photo, norm_matrix, transform_points, warp_labels
from stages.pixels.images import encode_png, photo_of
from stages.runtime import Runtime
from stages.settings import Settings

_GPU_BATCH = 16
_BARE = (1, 2, 3, 4, 5, 10, 11, 12, 13)
"""CelebAMask labels between eyes and mouth where nothing covers them: skin, brows, eyes, nose, mouth, lips."""


class Segment(BatchStage):
    """Labels the face crop by the configured segmenter, and drops faces of which next to nothing is kept."""

    name = "segment"
    reads = ("image", "sha256", "kps")
    writes = ("mask", "mask_share", "occlusion")
    drops = (DropReason.EMPTY_MASK, *reasons("segment"))

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        super().__init__(settings, runtime)
        make = backend("segmenter", settings.models.segmenter)
        self._segmenter: Any = make(settings.models, runtime.device)
        if runtime.device == "cuda" and hasattr(self._segmenter, "segment_all"):
            self.batch = _GPU_BATCH

    def given(self, record: Mapping[str, Any]) -> tuple[Image, Floats]:
        """The FFHQ-style crop, and the five points in it."""
        kps = record["kps"]
        return ffhq_crop(photo_of(record), kps), transform_points(ffhq_matrix(kps), kps)

    def computed(self, given: Sequence[tuple[Image, Floats]]) -> Sequence[Labels]:
        if self.batch == 1:
            return [self._segmenter.segment(crop, kps) for crop, kps in given]
        labels: Sequence[Labels] = self._segmenter.segment_all([crop for crop, _ in given])
        return labels

    def written(self, record: Mapping[str, Any], output: Labels) -> dict[str, Any]:
        kps = record["kps"]
        mask = warp_labels(output, kps, FACE_SIZE)
        height, width = photo_of(record).shape[:2]
        mask[~inside_photo(kps, width, height, FACE_SIZE)] = 0  # the border around the photo is background
        share = float(np.isin(mask, self.settings.segment.keep).mean())
        if share < self.settings.segment.min_share:
            raise Dropped(DropReason.EMPTY_MASK, mask_share=share)
        measured = {
            "mask_share": share,
            "occlusion": occlusion(mask, transform_points(norm_matrix(kps, FACE_SIZE), kps)),
        }
        require(self.name, measured, self.settings.filter)
        return {"mask": encode_png(mask), **measured}


def occlusion(mask: Labels, kps: Floats) -> float:
    """Share of the convex hull of five points (5, 2) in a label map that is labelled as none of _BARE, 0..1.

    Glasses, hair, hats, cloth, hands (background, to face parsers), and what lies beyond the photo.
    """
    hull = cv2.fillConvexPoly(np.zeros_like(mask), cv2.convexHull(kps).round().astype(np.int32), 1)
    return float(1 - np.isin(mask[hull > 0], _BARE).mean())
