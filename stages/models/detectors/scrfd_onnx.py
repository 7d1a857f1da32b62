"""SCRFD's network on ONNX Runtime: one canvas after the other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from schemas.arrays import Floats, Image
from stages.models.boxes import Candidates
from stages.models.onnx import load
from stages.models.torch_backend import DEVICE
from stages.runtime import Device


class ScrfdOnnx:
    """insightface's own model on ONNX Runtime; see `ScrfdTorch`, which gives the same."""

    def __init__(self, path: Path, device: Device) -> None:
        self._model = load(path, "detection", device)
        self.runtime = f"onnxruntime {self._model.session.get_providers()[0]}"
        self.use_kps: bool = self._model.use_kps
        self.static_input_size = self._model.static_input_size

    def __call__(self, canvases: Sequence[Image], lowest: float) -> list[Candidates]:
        """As `ScrfdTorch`. By the session that insightface keeps for each size: others differ in the last bit."""
        candidates = []
        for canvas in canvases:
            session = self._model._session_for_input_size(canvas.shape[1::-1])
            _, *seen = self._seen(session, canvas, lowest, 3)
            candidates.append(Candidates(*seen))
        return candidates

    def screened(self, canvases: Sequence[Image], lowest: float) -> list[tuple[float, Floats, Floats]]:
        """Of each canvas, of whatever size: the best score, and scores (N,) and boxes (N, 4) of at least `lowest`."""
        looks = []
        for canvas in canvases:
            best, scores, boxes = self._seen(self._model.session, canvas, lowest, 2)
            looks.append((best, scores, boxes))
        return looks

    def _seen(self, session: Any, canvas: Image, lowest: float, kinds: int) -> tuple[Any, ...]:
        """The best score, and scores, boxes and, as the third of the `kinds`, points (N, 5, 2) of at least `lowest`.

        Bit by bit what insightface's `forward` gives, which decodes all boxes, at a fraction of its cost.
        """
        model = self._model
        pixels = np.empty((1, 3, *canvas.shape[:2]), np.float32)
        # what cv2.dnn.blobFromImage does, which takes nine times as long
        for plane, colour in zip(pixels[0], cv2.split(canvas)[::-1], strict=True):
            np.subtract(colour, np.float32(model.input_mean), out=plane)
        pixels *= np.float32(1 / model.input_std)
        with DEVICE:
            outputs = session.run(model.output_names[: kinds * model.fmc], {model.input_name: pixels})
        best, likely = 0.0, []
        for level, stride in enumerate(model._feat_stride_fpn):
            scores, *distances = (output.reshape(-1, output.shape[-1]) for output in outputs[level :: model.fmc])
            best = max(best, float(scores.max(initial=0)))
            anchors, columns = np.flatnonzero(scores >= lowest), -(-canvas.shape[1] // stride)
            cells = anchors // model._num_anchors
            centres = np.stack([cells % columns, cells // columns], axis=1)
            reach, *offsets = (distance[anchors] for distance in distances)
            boxes = np.concatenate([centres - reach[:, :2], centres + reach[:, 2:]], axis=1) * stride
            points = [(centres[:, None] + each.reshape(-1, 5, 2)) * stride for each in offsets]
            likely.append([scores[anchors, 0], *(each.astype(np.float32) for each in (boxes, *points))])
        return best, *map(np.concatenate, zip(*likely, strict=True))
