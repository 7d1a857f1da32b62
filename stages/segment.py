"""Segment: which part of the face crop is skin, hair, background. Parsed on a wider crop, warped onto the face crop."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from schemas.drops import DropReason
from stages.align import FACE_SIZE
from stages.base import BatchStage, Dropped
from stages.models.backends import Floats, Image, backend
from stages.pixels.geometry import ffhq_crop, ffhq_matrix, inside_photo, transform_points, warp_labels
from stages.pixels.images import encode_png, photo_of
from stages.runtime import Runtime
from stages.settings import Settings

_GPU_BATCH = 16


class Segment(BatchStage):
    """Labels the face crop by the configured segmenter, and drops faces of which next to nothing is kept."""

    name: ClassVar[str] = "segment"
    reads: ClassVar[tuple[str, ...]] = ("image", "sha256", "kps")
    writes: ClassVar[tuple[str, ...]] = ("mask", "mask_share")
    drops: ClassVar[tuple[DropReason, ...]] = (DropReason.EMPTY_MASK,)

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        """Load the segmenter."""
        super().__init__(settings, runtime)
        make = backend("segmenter", settings.models.segmenter)
        self._segmenter: Any = make(settings.models, runtime.device)

        if runtime.device == "cuda" and hasattr(self._segmenter, "segment_all"):
            self.batch = _GPU_BATCH

    def given(self, record: Mapping[str, Any]) -> tuple[Image, Floats]:
        """The FFHQ-style crop, and the five points in it."""
        kps = record["kps"]
        return ffhq_crop(photo_of(record), kps), transform_points(ffhq_matrix(kps), kps)

    def computed(self, given: Sequence[tuple[Image, Floats]]) -> Sequence[npt.NDArray[np.uint8]]:
        if self.batch == 1:
            return [self._segmenter.segment(crop, kps) for crop, kps in given]
        labels: Sequence[npt.NDArray[np.uint8]] = self._segmenter.segment_all([crop for crop, _ in given])
        return labels

    def written(self, record: Mapping[str, Any], output: npt.NDArray[np.uint8]) -> dict[str, Any]:
        kps = record["kps"]
        mask = warp_labels(output, kps, FACE_SIZE)
        height, width = photo_of(record).shape[:2]
        mask[~inside_photo(kps, width, height, FACE_SIZE)] = 0  # the border around the photo is background
        share = float(np.isin(mask, self.settings.segment.keep).mean())
        if share < self.settings.segment.min_share:
            raise Dropped(DropReason.EMPTY_MASK, mask_share=share)
        return {"mask": encode_png(mask), "mask_share": share}
