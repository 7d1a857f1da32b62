"""Viola and Jones's cascade of Haar features, from OpenCV's own files: no download, no network.

Classical and honest about it: frontal faces only, boxes rather than points. The four numbers and five points
below, in units of the cascade's square, are medians against SCRFD over 63 faces; eyes are refined by a second
cascade where it finds both. Paper: Viola and Jones 2001, doi:10.1109/CVPR.2001.990517; trained by Lienhart.
"""

import hashlib
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from schemas.errors import WeightsError
from stages.models.base import Faces, Floats, Image, ModelCard
from stages.settings import ModelSettings

_CASCADES = {
    "haarcascade_frontalface_alt2": "8bf6a3de53ee3e9d6e1d3d6f7ad7ee9ca2d6cc6e3a0f3eb9ff2a3a1db9a5a2d6",
}
