"""ArcFace recognisers of insightface packs, by insightface's own model code."""

from typing import Any

import cv2
import numpy as np

from schemas.errors import WeightsError
from stages.models.backends import Floats, Image, ModelCard, runtime_of
from stages.models.packs import pack_card, pack_file, pack_weights
from stages.models.papers import Weight
from stages.runtime import Device
from stages.settings import ModelSettings


class ArcFace:
    """The recogniser of `models.pack`: identity vectors as `app.get` gives them.

    One face at a time on ONNX Runtime, in batches on torch (`models.runtime`).
    """

    def __init__(self, settings: ModelSettings, device: Device) -> None:
        path = pack_file("face_embedder", settings)
        self._model: Any
        if runtime_of("face_embedder", settings, device) == "torch":
            from stages.models.face_embedders.arcface_torch import ArcFaceTorch

            self._model = ArcFaceTorch(path, device, compiled=settings.compile)
        else:
            from stages.models.onnx import load

            self._model = load(path, "recognition", device)
        dimension = self._model.output_shape[-1]
        if self._model.input_size != (112, 112) or dimension != 512:
            raise WeightsError(
                f"{path} takes {self._model.input_size} and gives {dimension} values; a pack's recogniser must take "
                "112x112 and give 512."
            )
        if device == "cuda" and hasattr(self._model, "require_same"):
            small = np.random.default_rng(0).integers(0, 256, (2, 14, 14, 3), np.uint8)
            self._model.require_same([cv2.resize(each, (112, 112), interpolation=cv2.INTER_CUBIC) for each in small])

    @classmethod
    def weights(cls, settings: ModelSettings) -> tuple[Weight, ...]:
        return pack_weights(settings)

    @classmethod
    def cards(cls, settings: ModelSettings) -> list[ModelCard]:
        return [pack_card("face_embedder", settings)]

    def embed(self, faces: Image) -> Floats:
        """(N, 512) raw embeddings of (N, 112, 112, 3) RGB norm_crops."""
        if len(faces) == 0:
            return np.zeros((0, 512), np.float32)
        if hasattr(self._model, "embed"):
            embedded: Floats = self._model.embed(faces)
            return embedded
        vectors = [self._model.get_feat(cv2.cvtColor(face, cv2.COLOR_RGB2BGR)) for face in faces]
        return np.concatenate(vectors).astype(np.float32)
