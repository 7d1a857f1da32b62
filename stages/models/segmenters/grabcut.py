"""GrabCut: splits a face from its background by colour alone, without weights.

Honest about what it is: it cannot tell the parts of a face, so all of the face is labelled skin.
Paper: Rother, Kolmogorov and Blake, SIGGRAPH 2004, doi:10.1145/1186562.1015720; the code is OpenCV's.
"""

import cv2
import numpy as np

from schemas.arrays import Doubles, Floats, Image, Labels
from stages.models.backends import WithoutWeights
from stages.runtime import Device
from stages.settings import ModelSettings

SKIN = 1
"""The CelebAMask label of all that is face."""

_SIDE = 128
"""Side at which the cut is made: a quarter of the crop; a face then costs 13 to 40 ms of one CPU thread."""
_ITERATIONS = 2
_STEP = 3
"""Every third pixel of a row and of a column shows which colours there are: 42 x 42."""
_SEED = 0

_FACE_CENTRE = 0.4
"""Where the middle of the face lies on the line from the eyes to the mouth."""
_HEAD_CENTRE = 0.2
"""The same for the head with its hair."""
_SURE, _LIKELY, _POSSIBLE = (0.62, 0.85), (0.92, 1.3), (1.5, 1.9)
"""Half axes of the ellipses (across, along) in eye-to-mouth distances: within the first all is face, beyond the last
none is, and between them the colours decide, starting from the second as a guess."""


class GrabCut(WithoutWeights):
    """Face against background, from three ellipses around the five points."""

    task = "segmenter"

    def __init__(self, settings: ModelSettings, device: Device) -> None:
        cv2.setNumThreads(1)

    def segment(self, image: Image, kps: Floats) -> Labels:
        """(512, 512) labels, 0 background and 1 face, of an aligned (512, 512, 3) RGB crop; `kps` (5, 2) lie in it."""
        side = image.shape[0]
        small = cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
        points = np.asarray(kps, np.float64) * (_SIDE / side)
        eyes, mouth = points[:2].mean(axis=0), points[3:].mean(axis=0)
        head, face = eyes + _HEAD_CENTRE * (mouth - eyes), eyes + _FACE_CENTRE * (mouth - eyes)
        mask = np.full((_SIDE, _SIDE), cv2.GC_BGD, np.uint8)
        _ellipse(mask, head, mouth - eyes, _POSSIBLE, cv2.GC_PR_BGD)
        _ellipse(mask, face, mouth - eyes, _LIKELY, cv2.GC_PR_FGD)
        _ellipse(mask, face, mouth - eyes, _SURE, cv2.GC_FGD)
        few = np.ascontiguousarray(mask[_STEP // 2 :: _STEP, _STEP // 2 :: _STEP])
        # OpenCV's labels of what is face are odd; where all is alike, there are no two kinds of colour to learn.
        if len(np.unique(few & 1)) == 2:
            colours = np.zeros((1, 65)), np.zeros((1, 65))
            cv2.setRNGSeed(_SEED)  # the colour clusters start from OpenCV's own random numbers
            fewer = cv2.resize(small, few.shape, interpolation=cv2.INTER_AREA)
            cv2.grabCut(fewer, few, None, *colours, 0, cv2.GC_INIT_WITH_MASK)  # the clusters alone
            cv2.grabCut(small, mask, None, *colours, _ITERATIONS, cv2.GC_EVAL)
        smooth = cv2.resize((mask & 1).astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
        return np.where(smooth > 0.5, np.uint8(SKIN), np.uint8(0))


def _ellipse(mask: Labels, centre: Doubles, axis: Doubles, half_axes: tuple[float, float], label: int) -> None:
    """Fill an ellipse whose second half axis lies along `axis`, in units of its length."""
    length = max(float(np.hypot(*axis)), 1.0)
    size = tuple(2 * half * length for half in half_axes)
    cv2.ellipse(mask, (centre.tolist(), size, float(np.degrees(np.arctan2(*axis[::-1]))) - 90), label, cv2.FILLED)
