"""Quality of faces for recognition (FIQA) by ONNX files: eDifFIQA(T) and its like, or InspireFace's pose-quality."""

from pathlib import Path

import cv2
import numpy as np

from schemas.arrays import Floats, Image
from schemas.digest import sha256_of_file
from schemas.errors import WeightsError
from stages.models.backends import ModelCard
from stages.models.onnx import ERRORS, cpu_session
from stages.models.papers import WEIGHTS, Weight
from stages.models.torch_backend import HALF, normalise
from stages.models.weights import card, find, stated_card
from stages.runtime import Device
from stages.settings import ModelSettings

_PAPERS = WEIGHTS["ediffiqa-t"]
_OUTPUTS = {112: 1, 96: 18}
"""Side of the picture -> numbers: the quality; or pose (3), points (10), and how badly each of the five shows, 0..1."""


class Fiqa:
    """One face at a time and always on the CPU, where it takes some milliseconds."""

    runtime = "onnxruntime CPUExecutionProvider"

    def __init__(self, settings: ModelSettings, device: Device) -> None:
        path = _given(settings) or find(_PAPERS, settings)
        try:
            self._session = cpu_session(path)
            fed = self._session.get_inputs()[0]
            self._input, self._side = fed.name, fed.shape[-1]
            numbers = self._run(np.zeros((112, 112, 3), np.uint8)).size
        except (*ERRORS, ValueError) as error:
            raise WeightsError(f"{path} cannot be used as models.fiqa ({error}).") from error
        if _OUTPUTS.get(self._side) != numbers:
            raise WeightsError(
                f"{path} is no models.fiqa: it makes {numbers} numbers of a picture of {self._side} px, not 1 of 112 "
                f"(eDifFIQA) or {_OUTPUTS[96]} of 96 (InspireFace's pose-quality)."
            )

    @classmethod
    def weights(cls, settings: ModelSettings) -> tuple[Weight, ...]:
        return () if _given(settings) else (_PAPERS,)

    @classmethod
    def cards(cls, settings: ModelSettings) -> list[ModelCard]:
        path = _given(settings)
        if path is None:
            return [card(_PAPERS, "fiqa", settings)]
        sha256 = sha256_of_file(path)
        licence = _PAPERS.licence if sha256 == _PAPERS.files[0].sha256 else ""
        return [stated_card(path.name, "fiqa", sha256, licence, "the table of weights")]

    def score(self, faces: Image) -> Floats:
        outputs = [self._run(face) for face in faces]
        scores = [float(one[0] if self._side == 112 else 1 - one[13:].mean()) for one in outputs]
        return np.array(scores, np.float32)

    def _run(self, face: Image) -> Floats:
        """Its numbers for a face. That of 96 px takes RGB too: in BGR it misses the points by more."""
        if self._side == 96:
            small = cv2.resize(face, (96, 96), interpolation=cv2.INTER_AREA)
            pixels = small[None].transpose(0, 3, 1, 2).astype(np.float32)
        else:
            pixels = normalise(face[None], HALF)
        numbers: Floats = self._session.run(None, {self._input: pixels})[0].reshape(-1)
        return numbers


def _given(settings: ModelSettings) -> Path | None:
    """The file that `models.fiqa` is the path of; a WeightsError when it is not there."""
    if not settings.fiqa.endswith(".onnx"):
        return None
    path = Path(settings.fiqa).expanduser()
    if not path.is_file():
        raise WeightsError(f"models.fiqa = {settings.fiqa!r} does not exist: correct it, or set ediffiqa-t.")
    return path
