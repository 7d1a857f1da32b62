"""SCRFD's network on torch: many canvases in one go, boxes decoded on the device."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from schemas.arrays import Floats, Image
from schemas.errors import PlanError, WeightsError
from stages.models.boxes import Candidates
from stages.models.onnx_torch import OnnxModule, one_by_one
from stages.models.packs import declared_pixels
from stages.models.torch_backend import Batches, normaliser, on_device, prepare
from stages.runtime import Device

_STRIDES = {6: (8, 16, 32), 9: (8, 16, 32), 10: (8, 16, 32, 64, 128), 15: (8, 16, 32, 64, 128)}
"""By the number of outputs, as insightface tells its exports apart."""
_GPU_BATCH = 32
_MEAN_STD = (127.5, 128.0)
_SCORE_TOLERANCE, _PIXEL_TOLERANCE = 0.02, 1.0


class ScrfdTorch:
    """An insightface detector's ONNX file on a device, in float16 there unless `dtype` says another."""

    def __init__(self, path: Path, device: Device, *, size: int = 0, dtype: Any = None, **options: Any) -> None:
        """`size` is that of a batch; 0 leaves it to the device. `options` are those of `Batches`."""
        prepare(device)
        self.runtime = f"torch {device}"
        module = OnnxModule(path)
        outputs = len(module.output_names)
        if outputs not in _STRIDES:
            raise WeightsError(f"{path} is not a detection model of insightface: it gives {outputs} outputs.")
        self.use_kps = outputs in (9, 15)
        self.static_input_size = tuple(module.input_shape[:1:-1]) if all(module.input_shape[2:]) else None
        self._strides = _STRIDES[outputs]
        self._dtype = dtype or (torch.float16 if device == "cuda" else torch.float32)
        self._module = on_device(module, device, self._dtype)
        mean, std = declared_pixels(path, "detector") or _MEAN_STD
        self._normalise = normaliser([mean], [std], device, self._dtype, 1.0)
        self._mean_std = mean, std
        self._path = path
        size = size or (_GPU_BATCH if device == "cuda" else 1)
        self.batches = Batches(self._decoded, size, device, read=_seen, **options)

    def __call__(self, canvases: Sequence[Image], lowest: float) -> list[Candidates]:
        """Candidates with a score of at least `lowest` of (n, n, 3) BGR canvases."""
        seen = self.batches(canvases, lowest)
        return [Candidates(rows[:, 0], rows[:, 1:5], rows[:, 5:].reshape(-1, 5, 2)) for _, rows in seen]

    def screened(self, canvases: Sequence[Image], lowest: float) -> list[tuple[float, Floats, Floats]]:
        """As `ScrfdOnnx` gives them, of (n, n, 3) canvases; all of one size after the other, so give few sizes."""
        return [(max(0.0, best), rows[:, 0], rows[:, 1:5]) for best, rows in self.batches(canvases, lowest)]

    def require_same(self, canvases: Sequence[Image], lowest: float) -> None:
        """Prove on this device that a batch gives what ONNX Runtime gives of each canvas, and each canvas alone here.

        Raises:
            PlanError: when a score is more than 0.02 away, or a box of at least `lowest` more than a pixel.
        """
        network = one_by_one(self._path)
        normalise = normaliser([self._mean_std[0]], [self._mean_std[1]], "cpu", torch.float32, 1.0)
        for (_, rows), canvas in zip(self.batches(canvases, -math.inf), canvases, strict=True):
            given = torch.from_numpy(canvas)[None]
            outputs = network(normalise(given.flip(3)))
            expected = self._boxes(outputs, canvas.shape[0], canvas.shape[1])[0].numpy()
            ((_, alone),) = self.batches([canvas], -math.inf)
            for other in (expected, alone):
                is_same = len(rows) == len(other)  # a score that is no number is left out
                if is_same:
                    differences = np.abs(rows - other)
                    distances = differences[other[:, 0] >= lowest, 1:]
                    is_same = differences[:, 0].max() <= _SCORE_TOLERANCE and (distances <= _PIXEL_TOLERANCE).all()
                if not is_same:
                    raise PlanError(
                        f"{self._path.name} gives other faces on torch than on ONNX Runtime here: set "
                        "models.runtime.detector = onnxruntime, or executor.gpus = 0."
                    )

    def _decoded(self, canvases: torch.Tensor) -> tuple[torch.Tensor]:
        """(N, anchors, 15) float32: score, box, points, in pixels of the canvas; of (N, n, n, 3) BGR uint8."""
        outputs = self._module(self._normalise(canvases.flip(3)))
        return (self._boxes(outputs, *canvases.shape[1:3]),)

    def _boxes(self, outputs: Sequence[torch.Tensor], height: int, width: int) -> torch.Tensor:
        """`_decoded` from what the network gives, for canvases of height x width."""
        levels = len(self._strides)
        parts = []
        for level, stride in enumerate(self._strides):
            scores, boxes, points = (output.float() for output in outputs[level::levels])
            rows, columns = (
                torch.arange(side // stride, dtype=torch.float32, device=scores.device) * stride
                for side in (height, width)
            )
            cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).reshape(-1, 2)
            centres = cells[:, None].expand(-1, scores.shape[1] // len(cells), -1).reshape(-1, 2)
            near, far = boxes[..., :2] * stride, boxes[..., 2:] * stride
            landmarks = centres.repeat(1, 5) + points * stride
            parts.append(torch.cat((scores, centres - near, centres + far, landmarks), dim=-1))
        return torch.cat(parts, dim=1)


def _seen(decoded: torch.Tensor, lowest: float) -> list[tuple[float, Floats]]:
    """Of each image the best score, and what `_decoded` gives with a score of at least `lowest`, selected there."""
    images, rows = torch.nonzero(decoded[..., 0] >= lowest, as_tuple=True)
    values = decoded[images, rows].cpu().numpy()
    counts = torch.bincount(images, minlength=len(decoded)).cpu().numpy()
    best: list[float] = decoded[..., 0].amax(1).tolist()
    return list(zip(best, np.split(values, counts.cumsum()[:-1]), strict=True))
