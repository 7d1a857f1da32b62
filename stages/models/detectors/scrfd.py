"""SCRFD of an insightface pack, by insightface's own model code, with looks at a bordered image for tight faces.

SCRFD misses a face that fills its input: it has learned faces with surroundings. Looks, at `det_size` n:

1. the photo letterboxed to n x n, exactly as insightface's `app.get` does it;
2. nothing found: the photo with a black border of half its longer side, screened at 0.3 n; when that sees something,
   looked at once more at n;
3. one face found: the bordered photo at 0.3 n, for a second face that is too large for the first look.
"""

from typing import ClassVar, NamedTuple

import cv2
import numpy as np

from schemas.errors import ConfigError, WeightsError
from stages.models.backends import Faces, Floats, Image, ModelCard
from stages.models.boxes import apart
from stages.models.packs import pack_card, pack_file, pack_weights
from stages.models.papers import Weight
from stages.runtime import Device
from stages.settings import ModelSettings


class _View(NamedTuple):
    """A square that the network sees, and how its points lie in the photo: (point - shift) / scale."""

    canvas: Image
    """(n, n, 3), BGR."""
    scale: Floats
    """(2,): x, y."""
    shift: int


class Scrfd:
    """Detector of an insightface pack."""

    lowest: ClassVar[float] = 0.2
    """Boxes are reported down to this score: a weak second face must be seen, even where it does not count as one."""
    suspicious: ClassVar[float] = 0.3
    """A screen's score from which the bordered photo is worth a look at full size."""
    border: ClassVar[float] = 0.5
    """Width of the border / longer side of the photo."""

    def __init__(self, settings: ModelSettings, device: Device) -> None:
        from stages.models.onnx import load

        path = pack_file("detector", settings)
        self._model = load(path, "detection", device)
        self._size = settings.det_size
        self._threshold = settings.det_thresh
        if not self._model.use_kps:
            raise WeightsError(
                f"{path} gives boxes without the five points: choose a pack whose detector has them (kps)."
            )
        fixed = self._model.static_input_size
        if fixed not in (None, (self._size, self._size)):
            raise ConfigError(f"{path} only takes images of {fixed[0]}x{fixed[1]}: set models.det_size = {fixed[0]}.")
        # A third of the side costs a tenth; on tight crops and pairs of faces it missed nothing that one half found.
        self._screen_size = self._size * 3 // 10 // 32 * 32 if fixed is None and self._size >= 128 else self._size

    @classmethod
    def weights(cls, settings: ModelSettings) -> tuple[Weight, ...]:
        return pack_weights(settings)

    @classmethod
    def cards(cls, settings: ModelSettings) -> list[ModelCard]:
        return [pack_card("detector", settings)]

    def detect(self, image: Image) -> Faces:
        """Faces of one RGB photo; boxes of the first look may reach over its edge, as insightface's do."""
        first = self._look(_letterbox(image, self._size))
        strong = int(np.count_nonzero(first.score >= self._threshold))
        if strong > 1:
            return first
        screen = self._padded(image, self._screen_size)
        if strong == 1:
            return _merge(first, screen, self._threshold, self._threshold)
        if not np.any(screen.score >= self.suspicious):
            return first
        tight = self._padded(image, self._size)
        return _merge(tight, first, self._threshold, self.lowest) if np.any(tight.score >= self._threshold) else first

    def _padded(self, image: Image, size: int) -> Faces:
        faces = self._look(_bordered(image, size, self.border))
        return _inside(faces, image.shape[1], image.shape[0])

    def _look(self, view: _View) -> Faces:
        """What the network sees, in pixels of the photo; as in insightface, overlaps are resolved there too."""
        scores, boxes, points = (np.concatenate(parts) for parts in self._model.forward(view.canvas, self.lowest))
        order = np.argsort(-scores.ravel(), kind="stable")
        boxes = (boxes - view.shift) / np.tile(view.scale, 2)
        points = (points - view.shift) / view.scale
        scored = np.hstack((boxes, scores)).astype(np.float32)[order]
        best = self._model.nms(scored)
        return Faces(scored[best, :4], points[order][best].astype(np.float32), scored[best, 4])


def _letterbox(image: Image, size: int) -> _View:
    """The photo at the top left of a black square, with the rounding and the single scale of insightface."""
    height, width = image.shape[:2]
    ratio = height / width
    new_width, new_height = (int(size / ratio), size) if ratio > 1 else (size, int(size * ratio))
    scale = new_height / height
    return _View(_paste(image, new_width, new_height, 0, size), np.array([scale, scale], np.float32), 0)


def _bordered(image: Image, size: int, border: float) -> _View:
    """The photo in a black square, as if padded on each side by a share of its longer side and then letterboxed.

    The border is never made at full resolution: the photo is reduced to what would be left of it.
    """
    height, width = image.shape[:2]
    longer = max(height, width)
    scale = size / (longer * (1 + 2 * border))
    new_width, new_height = max(round(width * scale), 1), max(round(height * scale), 1)
    shift = int(border * longer * scale)
    canvas = _paste(image, new_width, new_height, shift, size)
    return _View(canvas, np.array([new_width / width, new_height / height], np.float32), shift)


def _paste(image: Image, width: int, height: int, shift: int, size: int) -> Image:
    """The RGB photo reduced to width x height, at (shift, shift) of a black BGR square of side `size`."""
    canvas = np.zeros((size, size, 3), np.uint8)
    small = cv2.resize(image, (max(width, 1), max(height, 1)))
    canvas[shift : shift + height, shift : shift + width] = cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
    return canvas


def _inside(faces: Faces, width: int, height: int) -> Faces:
    """Faces whose centre is in the photo, boxes cut at its edges: what lies in the border has no pixels."""
    centre = (faces.bbox[:, :2] + faces.bbox[:, 2:]) / 2
    inside = np.all((centre > 0) & (centre < (width, height)), axis=1)
    limits = np.array([width, height, width, height], np.float32)
    return Faces(np.clip(faces.bbox[inside], 0, limits), faces.kps[inside], faces.score[inside])


def _merge(faces: Faces, further: Faces, threshold: float, lowest: float) -> Faces:
    """`faces`, and those of `further` (score at least `lowest`) that lie apart from its certain ones; best score first.

    A weak box says little of where its face is, so it hides nothing.
    """
    new = further.score >= lowest
    for box in faces.bbox[faces.score >= threshold]:
        new &= apart(further.bbox, box)
        new &= np.array([apart(box[None], other)[0] for other in further.bbox], bool)
    merged = Faces(*(np.concatenate((a, b[new])) for a, b in zip(faces, further, strict=True)))
    order = np.argsort(-merged.score, kind="stable")
    return Faces(*(values[order] for values in merged))
