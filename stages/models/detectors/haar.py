"""Viola and Jones's cascade of Haar features, from the files inside OpenCV: no download, no network.

Classical and honest about it: upright frontal faces only, and squares rather than points. `_BOX` and `_POINTS`
say where a face lies in the cascade's square: medians over 63 faces against SCRFD's boxes (forehead to chin)
and points, made symmetric. Where a second cascade sees both eyes, the layout is turned and scaled onto them;
the mean error of a point against SCRFD's is then 10 % of the eye distance (11 % without; 59 of the same faces).

Paper: Viola and Jones, CVPR 2001, doi:10.1109/CVPR.2001.990517; cascades trained by R. Lienhart and S. Hameed.
"""

from pathlib import Path

import cv2
import numpy as np

from schemas.arrays import Floats, Grey, Image
from schemas.digest import sha256_of_file
from schemas.errors import WeightsError
from stages.models.backends import Faces, ModelCard, WithoutWeights
from stages.runtime import Device
from stages.settings import ModelSettings

_FACE = "haarcascade_frontalface_alt2"
_EYE = "haarcascade_eye_tree_eyeglasses"
_LICENCE = "Intel License Agreement for OpenCV (BSD-style)"

_BOX = np.array([0.1, -0.07, 0.9, 1.1], np.float32)
_POINTS = np.array([[0.31, 0.393], [0.69, 0.393], [0.5, 0.608], [0.335, 0.783], [0.665, 0.783]], np.float32)

_MIN_NEIGHBOURS = 3
_HALF_SCORE_NEIGHBOURS = 10
"""Overlapping hits that make a score of 0.5. On 30 labelled photos, from which this was chosen, 3 false boxes had 4
or 5 hits, and 15 faces that are alone in their photo 29 to 91; small faces in groups had as few as 4."""
_MIN_SQUARE = 20
"""The window of the face cascade, pixels of the reduced photo."""
_SAME_FACE_IOU = 0.3
_PATCH = 200
"""Side to which a face is scaled for the eye cascade: its windows then need no scale of their own."""
_EYE_ROWS = slice(int(0.2 * _PATCH), int(0.58 * _PATCH))
_EYE_COLUMNS = (slice(int(0.1 * _PATCH), int(0.5 * _PATCH)), slice(int(0.5 * _PATCH), int(0.9 * _PATCH)))
_MIN_EYE, _MAX_EYE = (30, 30), (80, 80)
_MAX_EYE_SHIFT = 0.1
"""Eyes further from where they usually are (shares of the square) are brows or nostrils."""


class Haar(WithoutWeights):
    """Frontal faces by a cascade; `score` is n / (n + 10) for n overlapping hits, so 0.5 asks for ten."""

    def __init__(self, settings: ModelSettings, device: Device) -> None:
        """The photo is reduced to a long side of `det_size`.

        Raises:
            WeightsError: when this OpenCV carries no cascades.
        """
        cv2.setNumThreads(1)
        self._long_side = settings.det_size
        self._face = cv2.CascadeClassifier(str(_path(_FACE)))
        self._eye = cv2.CascadeClassifier(str(_path(_EYE)))

    @classmethod
    def cards(cls, settings: ModelSettings) -> list[ModelCard]:
        return [ModelCard(name, "detector", sha256_of_file(_path(name)), _LICENCE, True) for name in (_FACE, _EYE)]

    def detect(self, image: Image) -> Faces:
        """Faces of one (H, W, 3) RGB photo, best score first; boxes are clipped to the photo."""
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        height, width = grey.shape
        scale = min(1.0, self._long_side / max(grey.shape))
        nothing = Faces(np.empty((0, 4), np.float32), np.empty((0, 5, 2), np.float32), np.empty(0, np.float32))
        if round(scale * min(grey.shape)) < _MIN_SQUARE:  # a strip, of which nothing may be left
            return nothing
        small = grey if scale == 1 else cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        rects, counts = self._face.detectMultiScale2(
            small, scaleFactor=1.1, minNeighbors=_MIN_NEIGHBOURS, minSize=(_MIN_SQUARE, _MIN_SQUARE)
        )
        if len(rects) == 0:
            return nothing
        squares, hits = np.asarray(rects), np.ravel(counts)
        scores = hits / (hits + _HALF_SCORE_NEIGHBOURS)
        best_first = np.lexsort((squares[:, 0], -squares[:, 2], -scores))
        single = cv2.dnn.NMSBoxes(squares[best_first].tolist(), scores[best_first].tolist(), 0.0, _SAME_FACE_IOU)
        order = best_first[np.sort(np.ravel(single))]
        # left, top and side, in pixels of the photo
        squares, scores = (squares[order, :3] / scale).astype(np.float32), scores[order].astype(np.float32)
        boxes = [square[[0, 1, 0, 1]] + square[2] * _BOX for square in squares]
        points = [square[:2] + square[2] * self._points(grey, square) for square in squares]
        bbox = np.array(boxes, np.float32).clip(0, [width, height, width, height])
        return Faces(bbox.astype(np.float32), np.array(points, np.float32), scores)

    def _points(self, grey: Grey, square: Floats) -> Floats:
        """The five points (5, 2) in units of the square, turned onto the eyes where there are both."""
        left, top, side = square.astype(int)
        face = grey[top : top + side, left : left + side]
        patch = cv2.resize(face, (_PATCH, _PATCH), interpolation=cv2.INTER_AREA)
        centres = []
        for columns in _EYE_COLUMNS:
            rects, counts = self._eye.detectMultiScale2(
                patch[_EYE_ROWS, columns], 1.1, _MIN_NEIGHBOURS, minSize=_MIN_EYE, maxSize=_MAX_EYE
            )
            if len(rects) == 0:
                return _POINTS
            x, y, width, height = rects[int(np.argmax(np.ravel(counts)))]
            centres.append([columns.start + x + width / 2, _EYE_ROWS.start + y + height / 2])
        eyes = (np.array(centres) / _PATCH).astype(np.float32)
        if np.abs(eyes - _POINTS[:2]).max() > _MAX_EYE_SHIFT:
            return _POINTS
        # the similarity that takes the layout's eyes to these: a product of complex numbers
        layout = _POINTS[:, 0] + 1j * _POINTS[:, 1]
        first, second = eyes[:, 0] + 1j * eyes[:, 1]
        points = first + (layout - layout[0]) * (second - first) / (layout[1] - layout[0])
        return np.stack([points.real, points.imag], axis=1).astype(np.float32)


def _path(name: str) -> Path:
    path = Path(cv2.__file__).parent / "data" / f"{name}.xml"
    if not path.is_file():
        raise WeightsError(f"OpenCV {cv2.__version__} carries no {path.name}: install opencv-python<5.")
    return path
