"""SCRFD of an insightface pack, by insightface's own model code, with looks at a bordered image for tight faces.

SCRFD misses a face that fills its input: it has learned faces with surroundings. Looks, at `det_size` n:

1. the photo letterboxed to n x n, exactly as insightface's `app.get` does it;
2. no face: the photo with a black border of half its longer side, screened at 0.3 n; when that sees something,
   looked at once more at n;
3. one face: the bordered photo at 0.3 n, for a second face that is too large for the first look; not where a
   look at the reduced photo showed nothing beside the face;
4. a doubtful box beside a face (`models.second_look`): the box with its surroundings, at native scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import cv2
import numpy as np

from schemas.arrays import Floats, Image
from schemas.errors import ConfigError, WeightsError
from stages.models.backends import Faces, ModelCard, ReducedLook, runtime_of
from stages.models.boxes import apart, without_overlaps
from stages.models.packs import pack_card, pack_file, pack_weights
from stages.models.papers import Weight
from stages.runtime import Device
from stages.settings import ModelSettings

_DOUBTFUL, _CERTAIN = 0.1, 0.3
"""Scores of a reduced photo's best box between which its boxes are looked at closer. Of 256 faces that are kept, many
of them turned, dark or blurred, none scored under 0.18, four under 0.3; of faceless photos 43 % score 0.1, 3 % 0.3."""
_CROP, _AROUND, _MOST_CROPS = 128, 2.0, 8
"""Side of what is looked at closer, pixels; that of the square / longer side of the box in it; boxes of one photo."""
_MOST_REACH = 16_000
"""How far around such a box a photo is looked at that is larger than OpenCV can warp (32,766 px)."""
_WIDE = {(0, 1): 1.0, (0, -1): 0.8} | {(turn, 1): 0.6 for turn in (45, -45, 90, -90, 135, -135, 180)}
_LOOKS = {1.5: {(0, 1): 0.7, (0, -1): 0.56}, 3.0: _WIDE, 4.0: _WIDE}
"""How a doubtful second box is looked at: side of what is cut out for it / its own -> degrees by which it is turned,
and -1 where mirrored -> what a score counts then, since dogs and flowers are faces there more often than faces are
turned. From near, since little is around a pasted face, and a mask or light from behind hides some from afar."""
_NOTHING, _LIKELY = (0.25, 0.32), 0.5
"""The best score, of boxes whose centre is within its side, under which it is no face: where the first score is less
than 0.5, and where not, since faces that are hardly seen closer are hardly seen at first either."""
_CONTRAST, _SHOWN = 88, 0.5
"""What it must have for that, else a face would not be seen closer either, as in the dark, in haze, or in a corner:
grey levels from the 5th to the 95th percentile of its pixels; the share of a square of three sides that is photo."""
_LARGEST = 320
"""Longer side of a picture in which a face may fill anything: one of 350 px and more is seen less and less."""


class _View(NamedTuple):
    """A square that the network sees, and how its points lie in the photo: (point - shift) / scale."""

    canvas: Image
    """(n, n, 3), BGR."""
    scale: Floats
    """(2,): x, y."""
    shift: int


class Scrfd:
    """Detector of an insightface pack, on ONNX Runtime or on torch (`models.runtime`), there in batches."""

    lowest: ClassVar[float] = 0.2
    """Boxes are reported down to this score: a weak second face must be seen, even where it does not count as one."""
    suspicious: ClassVar[float] = 0.3
    """A screen's score from which the bordered photo is worth a look at full size."""
    border: ClassVar[float] = 0.5
    """Width of the border / longer side of the photo."""
    closer_look: ClassVar[int] = 4
    """Version of the rule of `models.second_look`, which a plan names: to be raised when the rule changes."""

    def __init__(self, settings: ModelSettings, device: Device) -> None:
        path = pack_file("detector", settings)
        self._size = settings.det_size
        self._threshold = settings.det_thresh
        self._second_look = settings.second_look
        self._model = _network(settings, device)
        self.runtime: str = self._model.runtime
        if not self._model.use_kps:
            raise WeightsError(
                f"{path} gives boxes without the five points: choose a pack whose detector has them (kps)."
            )
        fixed = self._model.static_input_size
        if fixed not in (None, (self._size, self._size)):
            raise ConfigError(f"{path} only takes images of {fixed[0]}x{fixed[1]}: set models.det_size = {fixed[0]}.")
        if device == "cuda" and hasattr(self._model, "require_same"):
            self._model.require_same([_letterbox(photo, self._size).canvas for photo in _proof_photos()], self.lowest)
        # A third of the side costs a tenth; on tight crops and pairs of faces it lacks nothing of what one half shows.
        self._screen_size = self._size * 3 // 10 // 32 * 32 if fixed is None and self._size >= 128 else self._size

    @classmethod
    def weights(cls, settings: ModelSettings) -> tuple[Weight, ...]:
        return tuple(dict.fromkeys(pack_weights(settings) + pack_weights(_of_screen(settings))))

    @classmethod
    def cards(cls, settings: ModelSettings) -> list[ModelCard]:
        cards = [pack_card("detector", settings)]
        if _of_screen(settings).pack != settings.pack:
            cards.append(replace(pack_card("detector", _of_screen(settings)), task="screen"))
        return cards

    @classmethod
    def screen(cls, settings: ModelSettings, device: Device) -> Callable[[Sequence[Image]], list[ReducedLook]] | None:
        """What looks at RGB photos that were reduced to a fraction of their size; None where the detector cannot.

        Raises:
            ConfigError: when a pack is named for it whose detector cannot.
        """
        network, on_torch = _network(_of_screen(settings), device), runtime_of("detector", settings, device) == "torch"
        if network.static_input_size is not None:
            if settings.screen == "detector":
                return None
            raise ConfigError(f"The detector of {settings.screen} takes images of one size only, and cannot screen.")

        return lambda images: _reduced_looks(network, images, cls.lowest, is_square=on_torch)

    def detect(self, image: Image) -> Faces:
        """Faces of one RGB photo; boxes of the first look may reach over its edge, as insightface's do."""
        return self.detect_all([image])[0]

    def detect_all(self, images: Sequence[Image], seen: Sequence[Any] | None = None) -> list[Faces]:
        """`detect` of each photo, in their order; looks of one size are made in batches where the runtime has them.

        `seen` are the points, in pixels of each photo, that the look at its reduced form showed, None where none was
        made. Where a second face changed the result (12 of 400 pairs), such a point scored 0.43 and more; 0.2 counts.
        """
        results = self._look([_letterbox(image, self._size) for image in images])
        strong = [int(np.count_nonzero(faces.score >= self._threshold)) for faces in results]
        points = seen or [None] * len(images)
        alone = [strong[i] == 1 and _all_in(points[i], faces.bbox[0]) for i, faces in enumerate(results)]
        doubtful = [i for i, count in enumerate(strong) if count <= 1 and not alone[i]]
        screens = dict(zip(doubtful, self._padded([images[i] for i in doubtful], self._screen_size), strict=True))
        hidden = [i for i in doubtful if not strong[i] and np.any(screens[i].score >= self.suspicious)]
        for i, tight in zip(hidden, self._padded([images[i] for i in hidden], self._size), strict=True):
            if np.any(tight.score >= self._threshold):
                results[i] = _merge(tight, results[i], self._threshold, self.lowest)
        for i in doubtful:
            if strong[i]:
                results[i] = _merge(results[i], screens[i], self._threshold, self._threshold)
        return self._looked_again(images, results)

    def _looked_again(self, images: Sequence[Image], results: list[Faces]) -> list[Faces]:
        """`results`, with less for doubtful boxes beside the best face of a photo that are no faces when seen closer.

        Each is seen upright, mirrored and turned, with more and less around it; if it shows anything, its score stands.
        """
        low, high = self._second_look
        doubtful = []
        for i, faces in enumerate(results):
            others = np.flatnonzero(apart(faces.bbox, faces.bbox[0])) if np.any(faces.score >= self._threshold) else ()
            if len(others) and faces.score[others].max() < high:  # else there is a second face anyway
                weak = [j for j in others if faces.score[j] >= low]
                doubtful += [(i, j) for j in weak if _contrast(images[i], faces.bbox[j]) >= _CONTRAST]
        if not doubtful:
            return results
        crops = []
        for i, j in doubtful:
            for around, turns in _LOOKS.items():
                # without smoothing, a large reduction would leave little of a blurred face
                by = max(1, int(around * np.ptp(results[i].bbox[j].reshape(2, 2), axis=0).max() / _CROP))
                image = images[i]
                if by > 1:
                    image = cv2.resize(image, None, fx=1 / by, fy=1 / by, interpolation=cv2.INTER_AREA)
                box, score = results[i].bbox[[j]] / np.float32(by), results[i].score[[j]]
                for turn, step in turns:
                    (crop,) = _closer(image, box, score, turn, around)
                    crops.append(np.ascontiguousarray(crop[:, ::step]))
        if self._model.static_input_size:
            crops = [np.pad(crop, ((0, self._size - _CROP), (0, self._size - _CROP), (0, 0))) for crop in crops]
        looks = iter(self._model.screened(crops, _DOUBTFUL))
        again = list(results)
        for i, j in doubtful:
            seen = 0.0
            for around, turns in _LOOKS.items():
                for weight, (_, scores, boxes) in zip(turns.values(), islice(looks, len(turns)), strict=True):
                    # the box is in the middle, if not well placed; the face beside it may stand at the edge
                    aside = np.abs((boxes[:, :2] + boxes[:, 2:]) / 2 - _CROP / 2).max(axis=1, initial=0)
                    seen = max(seen, weight * float(scores[aside <= _CROP / around / 2].max(initial=0)))
            if seen < _NOTHING[int(results[i].score[j] >= _LIKELY)]:
                score = again[i].score.copy()
                score[j] = seen
                again[i] = again[i]._replace(score=score)
        return [_best_first(faces) for faces in again]

    def _padded(self, images: Sequence[Image], size: int) -> list[Faces]:
        """A look at bordered photos: faces whose centre is in the photo, their boxes cut at its edges."""
        faces_inside = []
        for image, faces in zip(
            images, self._look([_bordered(each, size, self.border) for each in images]), strict=True
        ):
            limits = np.array(image.shape[1::-1] * 2, np.float32)
            centre = (faces.bbox[:, :2] + faces.bbox[:, 2:]) / 2
            inside = np.all((centre > 0) & (centre < limits[:2]), axis=1)
            bbox = np.clip(faces.bbox[inside], 0, limits)
            faces_inside.append(Faces(bbox, faces.kps[inside], faces.score[inside]))
        return faces_inside

    def _look(self, views: Sequence[_View]) -> list[Faces]:
        """What the network sees, in pixels of the photos; as in insightface, overlaps are resolved there too."""
        looks = []
        seen = self._model([view.canvas for view in views], self.lowest)
        for view, (scores, boxes, points) in zip(views, seen, strict=True):
            order = np.argsort(-scores, kind="stable")
            boxes = ((boxes - view.shift) / np.tile(view.scale, 2)).astype(np.float32)[order]
            points = ((points - view.shift) / view.scale).astype(np.float32)[order]
            best = without_overlaps(boxes)
            looks.append(Faces(boxes[best], points[best], scores[order][best]))
        return looks


def _reduced_looks(network: Any, images: Sequence[Image], lowest: float, *, is_square: bool) -> list[ReducedLook]:
    """The looks at reduced RGB photos; their points are the centres of boxes with a score of at least `lowest`.

    They are padded to whole cells of the network and not scaled: there is no detector size here. Of one in which a face
    may have more pixels than SCRFD sees in a face, a half is looked at too, and a half of this.
    """
    pictures = [[image] for image in images]
    for halves in pictures:
        while max(halves[-1].shape) > _LARGEST and min(halves[-1].shape[:2]) > 1:
            halves.append(cv2.resize(halves[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
    canvases = [_in_whole_cells(picture, is_square=is_square) for halves in pictures for picture in halves]
    seen = iter(network.screened(canvases, _DOUBTFUL))
    looks, crops = [], []
    for image, halves in zip(images, pictures, strict=True):
        best, scores, boxes = zip(*islice(seen, len(halves)), strict=True)
        score, box = np.concatenate(scores), np.concatenate([each * 2**power for power, each in enumerate(boxes)])
        likely = box[score >= lowest]
        looks.append(ReducedLook(max(best), (likely[:, :2] + likely[:, 2:]) / 2))
        crops.append(_closer(image, box, score) if _DOUBTFUL <= max(best) < _CERTAIN else [])
    closer = iter(network.screened([crop for several in crops for crop in several], _DOUBTFUL))
    for i, several in enumerate(crops):
        if several:
            looks[i] = looks[i]._replace(score=max(best for best, _, _ in islice(closer, len(several))))
    return looks


def _contrast(image: Image, box: Floats) -> float:
    """Grey levels from the 5th to the 95th percentile of the pixels in a box; 0 where too little around it is photo."""
    centre, reach = (box[:2] + box[2:]) / 2, 1.5 * np.ptp(box.reshape(2, 2), axis=0).max()
    shown = np.ptp(np.clip((centre - reach, centre + reach), 0, image.shape[1::-1]), axis=0)
    if shown.prod() < _SHOWN * (2 * reach) ** 2:
        return 0.0
    x1, y1, x2, y2 = np.clip(box, 0, None).astype(int)
    return float(np.ptp(np.percentile(image[y1 : y2 + 1, x1 : x2 + 1].mean(axis=2), (5, 95))))


def _closer(image: Image, boxes: Floats, scores: Floats, turn: float = 0, around: float = _AROUND) -> list[Image]:
    """The best boxes of a photo, turned, in BGR squares whose side is that of the box times `around`."""
    order = np.argsort(-scores, kind="stable")
    crops = []
    for index in order[without_overlaps(boxes[order])[:_MOST_CROPS]]:
        x1, y1, x2, y2 = boxes[index]
        scale = _CROP / (around * max(x2 - x1, y2 - y1, 1))
        part, centre = image, np.array([float(x1 + x2), float(y1 + y2)]) / 2
        if max(image.shape[:2]) > 2 * _MOST_REACH:
            reach, middle = min(ceil(_CROP / scale), _MOST_REACH), centre.astype(int)
            start = np.clip(middle - reach, 0, np.array(image.shape[1::-1]) - 1)
            right, bottom = np.maximum(middle + reach, start) + 1
            part, centre = image[start[1] : bottom, start[0] : right], centre - start
        matrix = cv2.getRotationMatrix2D(centre, turn, float(scale))
        matrix[:, 2] += _CROP / 2 - centre
        crops.append(np.ascontiguousarray(cv2.warpAffine(part, matrix, (_CROP, _CROP))[:, :, ::-1]))
    return crops


def _all_in(points: Any, box: Floats) -> bool:
    """Whether points (N, 2) are known, and all lie in a box (4,): x1 y1 x2 y2."""
    if points is None:
        return False
    centres = np.reshape(np.asarray(points, np.float32), (-1, 2))
    return bool(((centres >= box[:2]) & (centres <= box[2:])).all())


def _network(settings: ModelSettings, device: Device) -> Any:
    """The pack's detector as a function of canvases: what `ScrfdTorch` and `ScrfdOnnx` are."""
    path, runtime = pack_file("detector", settings), runtime_of("detector", settings, device)
    return _loaded(path, runtime, device, compiled=settings.compile)


@lru_cache(maxsize=2)
def _loaded(path: Path, runtime: str, device: Device, *, compiled: bool) -> Any:
    """One of a process, for the full look and the screen."""
    if runtime == "torch":
        from stages.models.detectors.scrfd_torch import ScrfdTorch

        return ScrfdTorch(path, device, compiled=compiled)
    from stages.models.detectors.scrfd_onnx import ScrfdOnnx

    return ScrfdOnnx(path, device)


def _of_screen(settings: ModelSettings) -> ModelSettings:
    """The settings with the pack whose detector screens."""
    other = settings.screen not in ("detector", "off")
    return settings.model_copy(update={"pack": settings.screen}) if other else settings


def _proof_photos() -> tuple[Image, Image]:
    """A photo with a face that comes with a library, and its mirror image."""
    from skimage.data import astronaut

    photo = np.ascontiguousarray(astronaut())
    return photo, np.ascontiguousarray(photo[:, ::-1])


def _letterbox(image: Image, size: int) -> _View:
    """The photo at the top left of a black square, with the rounding and the single scale of insightface."""
    height, width = image.shape[:2]
    ratio = height / width
    new_width, new_height = (int(size / ratio), size) if ratio > 1 else (size, int(size * ratio))
    scale = new_height / height
    return _View(_paste(image, new_width, new_height, 0, size), np.array([scale, scale], np.float32), 0)


def _in_whole_cells(image: Image, *, is_square: bool) -> Image:
    """An RGB photo as BGR with black to its right and below, up to whole cells; as a square of few possible sizes."""
    cell = 64 if is_square else 32
    height, width = image.shape[:2]
    padded = [-(-side // cell) * cell for side in (height, width)]
    bottom, right = ([max(padded)] * 2) if is_square else padded
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    canvas: Image = cv2.copyMakeBorder(bgr, 0, bottom - height, 0, right - width, cv2.BORDER_CONSTANT)
    return canvas


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


def _merge(faces: Faces, further: Faces, threshold: float, lowest: float) -> Faces:
    """`faces`, and those of `further` (score at least `lowest`) that lie apart from its certain ones; best score first.

    A weak box says little of where its face is, so it hides nothing.
    """
    new = further.score >= lowest
    for box in faces.bbox[faces.score >= threshold]:
        new &= apart(further.bbox, box)
        new &= np.array([apart(box[None], other)[0] for other in further.bbox], bool)
    return _best_first(Faces(*(np.concatenate((a, b[new])) for a, b in zip(faces, further, strict=True))))


def _best_first(faces: Faces) -> Faces:
    order = np.argsort(-faces.score, kind="stable")
    return Faces(*(values[order] for values in faces))
