"""ArcFace recognisers of insightface packs, by insightface's own model code."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from schemas.arrays import Floats, Image
from schemas.errors import WeightsError
from stages.models.backends import ModelCard, runtime_of
from stages.models.packs import pack_card, pack_file, pack_weights
from stages.models.papers import Weight
from stages.models.torch_backend import DEVICE
from stages.runtime import Device
from stages.settings import ModelSettings

_GPU_BATCH = 16
_TOLERANCE = 1e-3
"""Share of the largest value by which a vector may differ from one batch to another."""


class ArcFace:
    """The recogniser of `models.pack`: identity vectors as `app.get` gives them.

    In batches on a GPU: on torch always, on ONNX Runtime (`models.runtime`) where the file leaves their size open.
    """

    def __init__(self, settings: ModelSettings, device: Device) -> None:
        path = pack_file("face_embedder", settings)
        self._model: Any
        if runtime_of("face_embedder", settings, device) == "torch":
            from stages.models.face_embedders.arcface_torch import ArcFaceTorch

            self._model = ArcFaceTorch(path, device, compiled=settings.compile)
            self.runtime = f"torch {device}"
        else:
            from stages.models.onnx import load

            self._model = load(path, "recognition", device)
            self._size = _GPU_BATCH if device == "cuda" and self._keeps_faces_apart(_GPU_BATCH) else 1
            self.runtime = f"onnxruntime {self._model.session.get_providers()[0]}"
        dimension = self._model.output_shape[-1]
        if self._model.input_size != (112, 112) or dimension != 512:
            raise WeightsError(
                f"{path} takes {self._model.input_size} and gives {dimension} values; a pack's recogniser must take "
                "112x112 and give 512."
            )
        if device == "cuda" and hasattr(self._model, "require_same"):
            self._model.require_same(_proof_faces())

    @classmethod
    def weights(cls, settings: ModelSettings) -> tuple[Weight, ...]:
        return pack_weights(settings)

    @classmethod
    def cards(cls, settings: ModelSettings) -> list[ModelCard]:
        return [pack_card("face_embedder", settings)]

    def embed(self, faces: Image) -> Floats:
        if hasattr(self._model, "embed"):
            embedded: Floats = self._model.embed(faces)
            return embedded
        return self._embed_on_onnx_runtime(faces, self._size)

    def _embed_on_onnx_runtime(self, faces: Sequence[Image] | Image, size: int) -> Floats:
        """`embed` in batches of one size, the last one filled up: kernels do not depend on how many faces there are."""
        given = [cv2.cvtColor(face, cv2.COLOR_RGB2BGR) for face in faces]
        given += given[-1:] * (-len(given) % size)
        with DEVICE:
            vectors = [self._model.get_feat(given[start : start + size]) for start in range(0, len(given), size)]
        return np.concatenate(vectors)[: len(faces)].astype(np.float32)

    def _keeps_faces_apart(self, size: int) -> bool:
        """Whether each face of a batch gets the vector that it gets alone: not so with dynamic quantisation."""
        from stages.models.onnx import ERRORS

        faces = _proof_faces()
        try:
            together = self._embed_on_onnx_runtime(faces, size)
        except ERRORS:
            return False
        alone = np.concatenate([self._embed_on_onnx_runtime([face], size) for face in faces])
        return bool(np.abs(together - alone).max() <= _TOLERANCE * np.abs(alone).max())


def _proof_faces() -> list[Image]:
    """Two pictures of noise that differ in contrast."""
    small = np.random.default_rng(0).integers(0, 256, (2, 14, 14, 3), np.uint8)
    small[1] //= 2
    return [np.asarray(cv2.resize(each, (112, 112), interpolation=cv2.INTER_CUBIC), np.uint8) for each in small]
