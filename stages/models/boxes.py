"""Boxes of faces, x1 y1 x2 y2: how large they are, and which of them show the same face."""

import numpy as np
import numpy.typing as npt

from stages.models.backends import Floats

_SAME_FACE_IOU = 0.3


def areas(boxes: Floats) -> Floats:
    """(N,) areas of (N, 4) boxes x1 y1 x2 y2; 0 for one that is turned inside out."""
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    products: Floats = sides[:, 0] * sides[:, 1]
    return products


def apart(boxes: Floats, box: Floats) -> npt.NDArray[np.bool_]:
    """(N,): which boxes (N, 4) show another face than `box` (4,): little overlap, and their centre outside of it."""
    shared = areas(np.hstack([np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])]))
    union = areas(boxes) + areas(box[None]) - shared
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = ((centres >= box[:2]) & (centres <= box[2:])).all(axis=1)
    another: npt.NDArray[np.bool_] = (shared < _SAME_FACE_IOU * union) & ~inside
    return another
