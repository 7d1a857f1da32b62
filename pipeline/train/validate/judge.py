"""The judge of validation images: whose face they show, by an insightface pack.

It is best another pack than the one that made the condition, which has learned to please that one.
"""

import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.train.validate.grid import Pixels
from schemas.arcface import ARCFACE_SIZE
from schemas.errors import ConfigError, WeightsError

_DET_SIZE = (640, 640)
_PACKS = "~/.insightface/models"


class IdJudge:
    """ID similarity of images by the detector and the recogniser of an insightface pack, on the CPU."""

    def __init__(self, pack: str) -> None:
        """Load a pack: a folder, or the name of one under ~/.insightface/models; nothing is ever fetched.

        Raises:
            WeightsError: when there is no such folder, or it holds no detector or no recogniser.
            ConfigError: without ONNX Runtime.
        """
        folders = [Path(pack).expanduser(), Path(_PACKS).expanduser() / pack]
        # Insightface would fetch a pack that it does not find.
        folder = next((folder for folder in folders if any(folder.glob("*.onnx"))), None)
        if folder is None:
            raise WeightsError(
                f"watch.judge: {pack} is no folder with an insightface pack (*.onnx files): give the folder of one, "
                f"such as {_PACKS}/antelopev2."
            )
        self._app = _face_analysis(folder.resolve())

    def similarity(self, images: Pixels, faces: Pixels) -> list[float | None]:
        """Cosine between the largest face of each image and its reference; None for an image without a face.

        Args:
            images: (N, H, W, 3) uint8 RGB.
            faces: (N, S, S, 3) uint8 RGB, aligned to the ArcFace template as the shards' `face` is (S is 224 there).
        """
        cosines: list[float | None] = []
        for image, reference in zip(images, faces, strict=True):
            bgr = np.ascontiguousarray(image[..., ::-1])
            border = max(bgr.shape) // 2
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # insightface calls an old name of scikit-image
                # SCRFD misses a face that fills the image, so it gets a second look with a border around.
                seen = self._app.get(bgr) or self._app.get(
                    cv2.copyMakeBorder(bgr, border, border, border, border, cv2.BORDER_CONSTANT)
                )
            largest = max(seen, key=lambda one: np.prod(one.bbox[2:4] - one.bbox[:2]), default=None)
            cosines.append(None if largest is None else float(largest.normed_embedding @ self.embed(reference)))
        return cosines

    def embed(self, face: Pixels) -> npt.NDArray[np.float32]:
        """Normed ID vector (512,) of an aligned crop, which is too tight for a detector."""
        small = cv2.resize(face, (ARCFACE_SIZE, ARCFACE_SIZE), interpolation=cv2.INTER_AREA)
        bgr = np.ascontiguousarray(small[..., ::-1])
        vector: npt.NDArray[np.float32] = self._app.models["recognition"].get_feat(bgr).flatten()
        return vector / np.linalg.norm(vector)


def _face_analysis(folder: Path) -> Any:
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from insightface.app import FaceAnalysis
        from onnxruntime.capi import onnxruntime_pybind11_state as ort
    except ImportError as error:
        raise ConfigError(f"watch.judge needs ONNX Runtime ({error}): pip install onnxruntime.") from error
    lacks = "watch.judge: {} holds no {} model of insightface; give the folder of a whole pack."
    no_models = (ort.Fail, ort.InvalidArgument, ort.InvalidGraph, ort.InvalidProtobuf, ort.NotImplemented, DecodeError)
    try:
        app = FaceAnalysis(
            str(folder), allowed_modules=["detection", "recognition"], providers=["CPUExecutionProvider"]
        )
    except AssertionError as error:  # without a detector
        raise WeightsError(lacks.format(folder, "detection")) from error
    except no_models as error:
        raise WeightsError(
            f"watch.judge: a file in {folder} cannot be loaded by ONNX Runtime ({error}): fetch the pack again."
        ) from error
    if "recognition" not in app.models:
        raise WeightsError(lacks.format(folder, "recognition"))
    app.prepare(ctx_id=-1, det_size=_DET_SIZE)
    return app
