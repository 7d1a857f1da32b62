"""Segment: which part of the face crop is skin, hair, background. Parsed on a wider crop, warped onto the face crop."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from schemas.drops import DropReason
from stages.align import FACE_SIZE
from stages.base import Dropped, RowStage
from stages.models.backends import Segmenter, backend
from stages.pixels.geometry import ffhq_crop, ffhq_matrix, inside_photo, transform_points, warp_labels
from stages.pixels.images import encode_png, photo
from stages.runtime import Runtime
from stages.settings import Settings


class Segment(RowStage):
    """Labels the face crop by the configured segmenter, and drops faces of which next to nothing is kept."""

    name: ClassVar[str] = "segment"
    reads: ClassVar[tuple[str, ...]] = ("image", "sha256", "kps")
    writes: ClassVar[tuple[str, ...]] = ("mask", "mask_share")
    drops: ClassVar[tuple[DropReason, ...]] = (DropReason.EMPTY_MASK,)

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        """Load the segmenter."""
        super().__init__(settings, runtime)
        make = backend("segmenter", settings.models.segmenter)
        self._segmenter: Segmenter = make(settings.models, runtime.device)

    def row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        image, kps = photo(record["sha256"], record["image"]), record["kps"]
        labels = self._segmenter.segment(ffhq_crop(image, kps), transform_points(ffhq_matrix(kps), kps))
        mask = warp_labels(labels, kps, FACE_SIZE)
        height, width = image.shape[:2]
        mask[~inside_photo(kps, width, height, FACE_SIZE)] = 0  # the border around the photo is background
        share = float(np.isin(mask, self.settings.segment.keep).mean())
        if share < self.settings.segment.min_share:
            raise Dropped(DropReason.EMPTY_MASK, mask_share=share)
        return {"mask": encode_png(mask), "mask_share": share}
