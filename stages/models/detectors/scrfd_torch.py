"""SCRFD's network on torch: many canvases in one go, boxes decoded on the device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from schemas.errors import PlanError, WeightsError
from stages.models.backends import Image, ReducedLook
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
        self.batches = Batches(self._decoded, size or (_GPU_BATCH if device == "cuda" else 1), device, **options)

    def __call__(self, canvases: Sequence[Image], lowest: float) -> list[Candidates]:
        """Candidates with a score of at least `lowest` of (n, n, 3) BGR canvases of one size."""
        found = []
        for (decoded,) in self.batches(canvases):
            images, rows = torch.nonzero(decoded[..., 0] >= lowest, as_tuple=True)
            values = decoded[images, rows].cpu().numpy()
            counts = torch.bincount(images, minlength=len(decoded)).cpu().numpy()
            ends = counts.cumsum()
            for end, count in zip(ends, counts, strict=True):
                part = values[end - count : end]
                found.append(Candidates(part[:, 0], part[:, 1:5], part[:, 5:].reshape(-1, 5, 2)))
        return found

    def screened(self, canvases: Sequence[Image], lowest: float) -> list[ReducedLook]:
        """A look at each (n, n, 3) canvas, all of one size after the other, so give few."""
        looks: dict[int, ReducedLook] = {}
        for shape in {canvas.shape for canvas in canvases}:
            alike = [i for i, canvas in enumerate(canvases) if canvas.shape == shape]
            found = [decoded[..., :5].cpu().numpy() for (decoded,) in self.batches([canvases[i] for i in alike])]
            for i, boxes in zip(alike, np.concatenate(found), strict=True):
                seen = boxes[boxes[:, 0] >= lowest]
                looks[i] = ReducedLook(max(0.0, float(boxes[:, 0].max())), (seen[:, 1:3] + seen[:, 3:5]) / 2)
        return [looks[i] for i in range(len(canvases))]

    def require_same(self, canvases: Sequence[Image], lowest: float) -> None:
        """Prove on this device that a batch gives what ONNX Runtime gives of each canvas, and each canvas alone here.

        Raises:
            PlanError: when a score is more than 0.02 away, or a box of at least `lowest` more than a pixel.
        """
        network = one_by_one(self._path)
        normalise = normaliser([self._mean_std[0]], [self._mean_std[1]], "cpu", torch.float32, 1.0)
        together = torch.cat([decoded.cpu() for (decoded,) in self.batches(canvases)])
        for found, canvas in zip(together, canvases, strict=True):
            given = torch.from_numpy(canvas)[None]
            outputs = network(normalise(given.flip(3)))
            expected = self._boxes(outputs, canvas.shape[0], canvas.shape[1])[0]
            ((alone,),) = self.batches([canvas])
            for other in (expected, alone[0].cpu()):
                seen = other[:, 0] >= lowest
                scores, distances = (found - other)[:, 0].abs().max(), (found - other)[seen, 1:].abs()
                if not (scores <= _SCORE_TOLERANCE and (distances <= _PIXEL_TOLERANCE).all()):
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
