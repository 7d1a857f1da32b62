"""YuNet by OpenCV: a small detector whose licence (MIT) allows commercial use."""

import cv2
import numpy as np

from schemas.arrays import Image
from schemas.errors import WeightsError
from stages.models.backends import Faces, ModelCard
from stages.models.papers import WEIGHTS, Weight
from stages.models.weights import card, find
from stages.runtime import Device
from stages.settings import ModelSettings

_LOWEST = 0.2
_NMS = 0.3
_TOP_K = 5000


class YuNet:
    """OpenCV's FaceDetectorYN on the photo, reduced so that its long side is at most `det_size`."""

    runtime = "opencv cpu"

    def __init__(self, settings: ModelSettings, device: Device) -> None:
        cv2.setNumThreads(1)
        path = find(WEIGHTS["yunet"], settings)
        self._side = settings.det_size
        try:
            self._model = cv2.FaceDetectorYN.create(str(path), "", (self._side, self._side), _LOWEST, _NMS, _TOP_K)
        except cv2.error as error:
            raise WeightsError(f"{path} cannot be loaded by OpenCV ({error.err}): fetch it again.") from error

    @classmethod
    def weights(cls, settings: ModelSettings) -> tuple[Weight, ...]:
        return (WEIGHTS["yunet"],)

    @classmethod
    def cards(cls, settings: ModelSettings) -> list[ModelCard]:
        return [card(WEIGHTS["yunet"], "detector", settings)]

    def detect(self, image: Image) -> Faces:
        """Faces of one RGB photo; boxes may reach over its edge."""
        height, width = image.shape[:2]
        scale = min(1.0, self._side / max(height, width))
        size = max(round(width * scale), 1), max(round(height * scale), 1)
        # area averaging: YuNet was trained on photos, not on the aliases that other reductions leave
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image
        self._model.setInputSize(size)
        _, detected = self._model.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        # rows of x y w h, five points, score; the points start with the person's right eye, the image's left: our order
        rows = np.zeros((0, 15), np.float32) if detected is None else np.asarray(detected, np.float32)
        scale = np.array([width / size[0], height / size[1]], np.float32)
        corner, extent = rows[:, 0:2] * scale, rows[:, 2:4] * scale
        order = np.argsort(-rows[:, 14], kind="stable")
        bbox = np.hstack((corner, corner + extent))
        return Faces(bbox[order], (rows[:, 4:14].reshape(-1, 5, 2) * scale)[order], rows[order, 14])
