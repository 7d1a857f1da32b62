"""Boxes of faces, x1 y1 x2 y2: how large they are, and which of them show the same face."""

from typing import NamedTuple

import numpy as np

from schemas.arrays import Floats, Mask

_SAME_FACE_IOU = 0.3
_OVERLAP = 0.4
"""Share of the union of two boxes from which the lower score is the same detection: insightface's threshold."""


class Candidates(NamedTuple):
    """Boxes of one canvas before overlaps are resolved, in its pixels, in the order of the network's anchors."""

    scores: Floats
    """(N,)."""
    boxes: Floats
    """(N, 4): x1 y1 x2 y2."""
    points: Floats
    """(N, 5, 2)."""


def areas(boxes: Floats) -> Floats:
    """(N,) areas of (N, 4) boxes x1 y1 x2 y2; 0 for one that is turned inside out."""
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    products: Floats = sides[:, 0] * sides[:, 1]
    return products


def apart(boxes: Floats, box: Floats) -> Mask:
    """(N,): which boxes (N, 4) show another face than `box` (4,): little overlap, and their centre outside of it."""
    shared = areas(np.hstack([np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])]))
    union = areas(boxes) + areas(box[None]) - shared
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = ((centres >= box[:2]) & (centres <= box[2:])).all(axis=1)
    another: Mask = (shared < _SAME_FACE_IOU * union) & ~inside
    return another


def without_overlaps(boxes: Floats) -> list[int]:
    """Rows of (N, 4) boxes, best first, that overlap no better one: insightface's suppression, in whole pixels."""
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    surfaces = sides[:, 0] * sides[:, 1]
    order, best = np.arange(len(boxes)), []
    while order.size > 0:
        first, rest = order[0], order[1:]
        best.append(int(first))
        shared = np.minimum(boxes[first, 2:], boxes[rest, 2:]) - np.maximum(boxes[first, :2], boxes[rest, :2]) + 1
        common = np.maximum(shared[:, 0], 0) * np.maximum(shared[:, 1], 0)
        order = rest[common / (surfaces[first] + surfaces[rest] - common) <= _OVERLAP]
    return best
