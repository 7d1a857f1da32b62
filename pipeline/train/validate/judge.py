"""The judge of validation images: whose face they show, by an insightface pack.

It is best another pack than the one that made the condition, which has learned to please that one.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from schemas.errors import ConfigError, WeightsError

Image = npt.NDArray[np.uint8]
"""(H, W, 3) RGB."""

SIDE = 112
"""Side of a recogniser's input, pixels."""
_DET_SIZE = (640, 640)
_PACKS = "~/.insightface/models"


class Judge:
    """ID similarity of images by the detector and the recogniser of an insightface pack, on the CPU."""

    def __init__(self, pack: str) -> None:
        """Load a pack: a folder, or the name of one under ~/.insightface/models; nothing is ever fetched.

        Raises:
            WeightsError: when there is no such folder, or it holds no detector or no recogniser.
        """
        self._app = _face_analysis(_pack_folder(pack))

    def similarity(self, images: Image, faces: Image) -> list[float | None]:
        """Cosine between the largest face of each image and its reference; None where no face is found.

        Args:
            images: (N, H, W, 3) uint8 RGB.
            faces: (N, S, S, 3) uint8 RGB, aligned to the ArcFace template as the shards' `face` is (S is 224 there).
        """
        return [self._compare(image, face) for image, face in zip(images, faces, strict=True)]

    def _compare(self, image: Image, face: Image) -> float | None:
        found = self._faces(_bgr(image))
        if not found:
            return None
        largest = max(found, key=lambda one: (one.bbox[2] - one.bbox[0]) * (one.bbox[3] - one.bbox[1]))
        return float(largest.normed_embedding @ self.embed(face))

    def _faces(self, bgr: Image) -> Any:
        """Faces of an image; SCRFD misses one that fills it, so it gets a second look with a border around."""
        border = max(bgr.shape) // 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # insightface calls an old name of scikit-image
            return self._app.get(bgr) or self._app.get(
                cv2.copyMakeBorder(bgr, border, border, border, border, cv2.BORDER_CONSTANT)
            )

    def embed(self, face: Image) -> npt.NDArray[np.float32]:
        """Normed ID vector (512,) of an aligned crop, which is too tight for a detector."""
        small = cv2.resize(face, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        vector: npt.NDArray[np.float32] = self._app.models["recognition"].get_feat(_bgr(small)).flatten()
        return vector / np.linalg.norm(vector)


def _bgr(image: Image) -> Image:
    return np.ascontiguousarray(image[..., ::-1])


def _pack_folder(pack: str) -> Path:
    """The folder of a pack, which insightface would fetch if it were missing."""
    given = Path(pack).expanduser()
    for folder in (given, Path(_PACKS).expanduser() / pack):
        if any(folder.glob("*.onnx")):
            return folder.resolve()
    raise WeightsError(
        f"watch.judge: {pack} is no folder with an insightface pack (*.onnx files): give the folder of one, such as"
        f" {_PACKS}/antelopev2."
    )


def _face_analysis(folder: Path) -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # insightface imports albumentations, which asks its index
    try:
        from insightface.app import FaceAnalysis
    except ImportError as error:
        raise ConfigError(f"watch.judge needs ONNX Runtime ({error}): pip install onnxruntime.") from error
    modules, providers = ["detection", "recognition"], ["CPUExecutionProvider"]
    try:
        app = FaceAnalysis(str(folder), allowed_modules=modules, providers=providers)
    except AssertionError as error:  # how it says that there is no detector
        raise _no_pack(folder, "detection") from error
    except _unloadable() as error:
        raise WeightsError(
            f"watch.judge: a file in {folder} cannot be loaded by ONNX Runtime ({error}): fetch the pack again."
        ) from error
    if "recognition" not in app.models:
        raise _no_pack(folder, "recognition")
    app.prepare(ctx_id=-1, det_size=_DET_SIZE)
    return app


def _unloadable() -> tuple[type[Exception], ...]:
    """What ONNX Runtime and insightface raise for files that are no models."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnxruntime.capi import onnxruntime_pybind11_state as ort

    return (ort.Fail, ort.InvalidArgument, ort.InvalidGraph, ort.InvalidProtobuf, ort.NotImplemented, DecodeError)


def _no_pack(folder: Path, task: str) -> WeightsError:
    return WeightsError(f"watch.judge: {folder} holds no {task} model of insightface; give the folder of a whole pack.")
