"""The judge of images: whether they show a face, whose, and how it is turned, by an insightface pack.

It is best another pack than the one that made the condition, which has learned to please that one.
"""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.train.loader import Pixels
from schemas.arcface import ARCFACE_SIZE, LICENCES
from schemas.digest import sha256_of_file
from schemas.errors import ConfigError, WeightsError

_DET_SIZE = (640, 640)
NOT_KNOWN = "not known"
_TASKS = {"detection": "detector", "recognition": "face_embedder"}
_PACKS = "~/.insightface/models"


class Look(NamedTuple):
    """A face in an image."""

    embedding: npt.NDArray[np.float32]
    """(512,), normed."""
    kps: npt.NDArray[np.float32]
    """(5, 2), in pixels of the image, or of the image with a border around."""


class IdJudge:
    """The detector and the recogniser of an insightface pack, on the CPU."""

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
        self.name = folder.name
        files = {task: Path(model.model_file) for task, model in self._app.models.items()}
        hashes = {task: sha256_of_file(file) for task, file in files.items()}
        self.weights = [
            {"name": files[task].stem, "task": _TASKS[task], "sha256": sha, "licence": LICENCES.get(sha, NOT_KNOWN)}
            for task, sha in hashes.items()
        ]
        """name, task (detector, face_embedder), sha256 and licence, which is known by the hash."""

    def look(self, image: Pixels) -> Look | None:
        """The largest face of an image (H, W, 3), RGB; None where there is none."""
        bgr = np.ascontiguousarray(image[..., ::-1])
        border = max(bgr.shape) // 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # insightface calls an old name of scikit-image
            # SCRFD misses a face that fills the image, so it gets a second look with a border around.
            seen = self._app.get(bgr) or self._app.get(
                cv2.copyMakeBorder(bgr, border, border, border, border, cv2.BORDER_CONSTANT)
            )
        largest = max(seen, key=lambda one: np.prod(one.bbox[2:4] - one.bbox[:2]), default=None)
        return None if largest is None else Look(largest.normed_embedding, largest.kps)

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
