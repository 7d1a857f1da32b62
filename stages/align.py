"""Align: the face, upright and of standard size, and what its crop looks like."""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from schemas.arcface import ARCFACE_SIZE, pose
from stages.base import RowStage
from stages.filter import reasons, require
from stages.pixels.geometry import norm_crop
from stages.pixels.images import encode_jpeg, photo_of

FACE_SIZE = 224
"""Side of `face` and `mask`, pixels."""

_FACE_QUALITY = 99
"""Decoded, the crop differs from the raw one by 0.3 to 0.7 grey levels on real photos (98: up to 1.1)."""


class Align(RowStage):
    """Cuts the norm_crops and measures their sharpness, brightness and roll; drops none unless thresholds are set."""

    name = "align"
    reads = ("image", "sha256", "kps")
    writes = ("face", "face112", "sharpness", "brightness", "roll_deg")
    drops = reasons("align")

    def row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        image, kps = photo_of(record), record["kps"]
        face = norm_crop(image, kps, FACE_SIZE)
        grey = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)
        measured = {
            "sharpness": float(np.var(cv2.Laplacian(grey, cv2.CV_64F))),
            "brightness": float(grey.mean()),
            "roll_deg": float(pose(np.array([kps], np.float64))[2][0]),
        }
        require(self.name, measured, self.settings.filter)
        face112 = norm_crop(image, kps, ARCFACE_SIZE)
        return {"face": encode_jpeg(face, _FACE_QUALITY), "face112": face112.tobytes(), **measured}
