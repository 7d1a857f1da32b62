"""Small pictures for the report: boxes and points drawn on photos, labels over faces."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from stages.models.backends import Image
from stages.pixels.images import encode_jpeg, shrink

_QUALITY = 80
_BOX_COLOUR = (255, 214, 0)
_POINT_COLOURS = ((255, 64, 64), (64, 160, 255), (80, 220, 100), (255, 140, 0), (200, 90, 255))
_LABEL_WEIGHT = 0.55

# fmt: off
LABEL_COLOURS: dict[str, tuple[int, int, int]] = {
    "background": (40, 40, 40), "skin": (60, 130, 255), "left brow": (160, 90, 40), "right brow": (200, 140, 70),
    "left eye": (255, 255, 255), "right eye": (200, 255, 255), "glasses": (0, 200, 210), "left ear": (150, 190, 40),
    "right ear": (200, 230, 90), "earring": (255, 215, 0), "nose": (50, 190, 90), "mouth": (120, 0, 40),
    "upper lip": (230, 40, 80), "lower lip": (255, 110, 160), "neck": (120, 90, 230), "necklace": (255, 160, 20),
    "cloth": (127, 127, 127), "hair": (225, 60, 200), "hat": (255, 120, 60),
}
# fmt: on
"""CelebAMask label -> RGB, in BiSeNet order: the n-th is the colour of label n. No skin is blue: it shows on all."""


def reduced(image: Image, side: int) -> bytes:
    """(H, W, 3) RGB as a JPEG of at most `side` x `side` pixels."""
    return encode_jpeg(shrink(image, side), _QUALITY)


def marked(
    image: Image, side: int, frame: npt.ArrayLike, bbox: npt.ArrayLike | None, kps: npt.ArrayLike | None
) -> bytes:
    """A reduced photo with its face box and five points drawn, as JPEG.

    Args:
        image: (H, W, 3) RGB: the part `frame` of the photo, at any scale.
        side: long side of the result, pixels.
        frame: x0 y0 x1 y1 of the image in the photo, pixels of the photo.
        bbox: (4,) xyxy, pixels of the photo, or None.
        kps: (5, 2), pixels of the photo, or None.
    """
    canvas = shrink(image, side).copy()
    corners = np.asarray(frame, np.float64).reshape(2, 2)
    scale = np.array([canvas.shape[1], canvas.shape[0]]) / (corners[1] - corners[0])
    thickness = max(1, round(max(canvas.shape) / 220))
    if bbox is not None:
        first, second = _pixels((np.reshape(bbox, (2, 2)) - corners[0]) * scale)
        cv2.rectangle(canvas, first, second, _BOX_COLOUR, thickness, cv2.LINE_AA)
    if kps is not None:
        points = _pixels((np.asarray(kps) - corners[0]) * scale)
        radius = int(np.clip(np.ptp(points, axis=0)[1] / 12, 1, 2 * thickness))
        for point, colour in zip(points, _POINT_COLOURS, strict=True):
            cv2.circle(canvas, point, radius, colour, cv2.FILLED, cv2.LINE_AA)
    return encode_jpeg(canvas, _QUALITY)


def _pixels(points: npt.NDArray[Any]) -> list[tuple[int, int]]:
    """(N, 2) positions as OpenCV wants them; undefined ones, and those far away, are put where none sees them."""
    safe = np.clip(np.nan_to_num(points, nan=-1e4, posinf=1e4, neginf=-1e4), -1e4, 1e4)
    return [(int(x), int(y)) for x, y in safe.round()]


def masked(face: Image, mask: npt.NDArray[np.uint8], side: int) -> bytes:
    """A face (H, W, 3) RGB under the colours of its labels (H, W), as JPEG; unknown labels are black."""
    colours = np.zeros((256, 3), np.float32)
    colours[: len(LABEL_COLOURS)] = list(LABEL_COLOURS.values())
    mixed = face * (1 - _LABEL_WEIGHT) + colours[mask] * _LABEL_WEIGHT
    return reduced(mixed.round().astype(np.uint8), side)
