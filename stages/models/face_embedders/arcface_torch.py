"""ArcFace's network on torch: many faces in one go."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from schemas.arrays import Floats, Image
from schemas.errors import PlanError, WeightsError
from stages.models.onnx_torch import OnnxModule, one_by_one
from stages.models.packs import declared_pixels
from stages.models.torch_backend import Batches, normaliser, on_device, prepare
from stages.runtime import Device

_GPU_BATCH = 64
_MEAN_STD = (127.5, 127.5)
_COSINE, _QUANTISED_COSINE = 0.999, 0.98


class ArcFaceTorch:
    """An insightface recogniser's ONNX file on a device, in float16 there unless `dtype` says another."""

    def __init__(self, path: Path, device: Device, *, size: int = 0, dtype: Any = None, **options: Any) -> None:
        """`size` is that of a batch; 0 leaves it to the device. `options` are those of `Batches`."""
        prepare(device)
        graph = OnnxModule(path)
        self.input_size = tuple(graph.input_shape[:1:-1])
        dtype = dtype or (torch.float16 if device == "cuda" else torch.float32)
        # exports of mxnet hold their own normalisation: insightface tells them by the names of their first nodes
        starts = [name.lstrip("_").lower()[:5] for name in graph.first_nodes]
        own = any(name[:3] in ("sub", "minus"[:3]) for name in starts) and any(name[:3] == "mul" for name in starts)
        mean, std = declared_pixels(path, "face_embedder") or ((0.0, 1.0) if own else _MEAN_STD)
        self.module = module = on_device(graph, device, dtype)
        normalise = normaliser([mean], [std], device, dtype, 1.0)
        self.batches = Batches(
            lambda faces: (module(normalise(faces))[0].float(),),
            size or (_GPU_BATCH if device == "cuda" else 1),
            device,
            **options,
        )
        self._path, self._mean_std, self._is_quantised = path, (mean, std), graph.is_quantised
        try:
            self.output_shape = self.embed(np.zeros((1, 112, 112, 3), np.uint8)).shape
        except RuntimeError as error:
            raise WeightsError(f"{path} is not a recognition model of insightface ({error}).") from error

    def require_same(self, faces: Sequence[Image]) -> None:
        """Prove on this device that a batch gives what ONNX Runtime gives of each face, and each face alone here.

        Raises:
            PlanError: when a cosine is under 0.999; for a file with dynamic quantisation 0.98: there a last bit
                decides how a value is rounded, layer after layer.
        """
        network = one_by_one(self._path)
        normalise = normaliser([self._mean_std[0]], [self._mean_std[1]], "cpu", torch.float32, 1.0)
        least = _QUANTISED_COSINE if self._is_quantised else _COSINE
        for vector, face in zip(self.embed(faces), faces, strict=True):
            (expected,) = network(normalise(torch.from_numpy(face)[None]))
            for other in (expected.numpy().ravel(), self.embed([face])[0]):
                if not vector @ other >= least * np.linalg.norm(vector) * np.linalg.norm(other):
                    raise PlanError(
                        f"{self._path.name} gives other vectors on torch than on ONNX Runtime here: set "
                        "models.runtime.face_embedder = onnxruntime, or executor.gpus = 0."
                    )

    def embed(self, faces: Iterable[Image]) -> Floats:
        """(N, 512) raw embeddings of (N, 112, 112, 3) RGB norm_crops."""
        return np.stack([vector for (vector,) in self.batches(faces)])
