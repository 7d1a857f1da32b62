"""Photos composed of real faces on pictures without any: one, two or none, of a known size, anywhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

AROUND = 0.9
"""What of a face's surroundings comes along on each side, as a share of its box."""
NOISE = 2.0
"""Standard deviation of the sensor noise that hides where pictures were joined, grey levels."""


@dataclass(frozen=True)
class Face:
    """A face cut out of a photo, with its surroundings."""

    pixels: np.ndarray
    """(H, W, 3), RGB."""
    px: float
    """Short side of its box."""


def cut(photo: np.ndarray, bbox: list[float]) -> Face:
    """The face of a photo; `bbox` is x1 y1 x2 y2."""
    x1, y1, x2, y2 = bbox
    margin = AROUND * max(x2 - x1, y2 - y1)
    height, width = photo.shape[:2]
    left, top, right, bottom = (round(max(0, edge)) for edge in (x1 - margin, y1 - margin, x2 + margin, y2 + margin))
    return Face(photo[top : min(bottom, height), left : min(right, width)], min(x2 - x1, y2 - y1))


def degraded(face: Face, rng: np.random.Generator) -> Face:
    """The face turned by up to 40 degrees, darker or lighter, and at times grey, blurred or noisy."""
    pixels = _turned(face.pixels, rng.uniform(-40, 40)).astype(np.float32)
    pixels = (pixels / 255) ** rng.uniform(0.5, 2.2) * 255 * rng.uniform(0.35, 1.1)
    if rng.random() < 0.3:
        pixels = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    if rng.random() < 0.4:
        pixels = cv2.GaussianBlur(pixels, (0, 0), rng.uniform(1, max(1.1, 0.03 * face.px)))
    if rng.random() < 0.4:
        pixels = pixels + rng.normal(0, rng.uniform(5, 30), pixels.shape)
    return Face(np.clip(pixels, 0, 255).astype(np.uint8), face.px)


def compose(
    faces: list[Face],
    grounds: list[np.ndarray],
    count: int,
    seed: int,
    side: tuple[int, int] = (1100, 4000),
    wanted: Sequence[int] = (0, 1, 1, 2),
) -> Iterator[tuple[int, bytes]]:
    """Numbers of faces, `wanted` again and again, and JPEGs, of sides between `side`, with faces of 128 to 400 px."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        width, height = (int(length) for length in rng.integers(side[0], side[1], 2, endpoint=True))
        picture = _ground(grounds[rng.integers(len(grounds))], width, height, rng)
        taken: list[tuple[int, int, int, int]] = []
        for _ in range(wanted[number % len(wanted)]):
            _paste(picture, faces[rng.integers(len(faces))], float(rng.uniform(128, 400)), taken, rng)
        yield len(taken), _jpeg(picture, rng)


def _jpeg(picture: np.ndarray, rng: np.random.Generator) -> bytes:
    noisy = picture + rng.normal(0, NOISE, picture.shape[:2])[..., None]
    pixels = np.clip(noisy, 0, 255).astype(np.uint8)
    done, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(75, 96))])
    assert done
    return data.tobytes()


def _turned(pixels: np.ndarray, degrees: float) -> np.ndarray:
    height, width = pixels.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1.0)
    return cv2.warpAffine(pixels, turn, (width, height), borderMode=cv2.BORDER_REFLECT)


def _at_most(face: Face, px: float) -> Face:
    """The face reduced to `px` where it is larger."""
    factor = min(1.0, px / face.px)
    return Face(cv2.resize(face.pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA), face.px * factor)


def _ground(photo: np.ndarray, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """A part of a picture without faces, mirrored by chance, at a size."""
    rows, columns = photo.shape[:2]
    scale = max(width / columns, height / rows) * rng.uniform(1, 1.5)
    size = max(width, round(columns * scale)), max(height, round(rows * scale))
    large = cv2.resize(photo, size, interpolation=cv2.INTER_CUBIC)
    top, left = rng.integers(size[1] - height + 1), rng.integers(size[0] - width + 1)
    part = large[top : top + height, left : left + width]
    return (part[:, ::-1] if rng.random() < 0.5 else part).astype(np.float32)


def _paste(picture: np.ndarray, face: Face, px: float, taken: list, rng: np.random.Generator) -> None:
    """A face of `px` where no other is, with soft edges; nothing where it finds no room."""
    factor = px / face.px
    size = [max(8, round(side * factor)) for side in face.pixels.shape[1::-1]]
    if size[0] > picture.shape[1] or size[1] > picture.shape[0]:
        return
    small = cv2.resize(face.pixels, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    for _ in range(20):
        left, top = (int(rng.integers(room + 1)) for room in (picture.shape[1] - size[0], picture.shape[0] - size[1]))
        box = left, top, left + size[0], top + size[1]
        if all(box[2] <= a or c <= box[0] or box[3] <= b or d <= box[1] for a, b, c, d in taken):
            edge = max(2, round(0.08 * min(size)))
            soft = np.zeros(size[::-1], np.float32)
            soft[edge:-edge, edge:-edge] = 1
            soft = cv2.GaussianBlur(soft, (0, 0), edge / 2)[..., None]
            target = picture[top : top + size[1], left : left + size[0]]
            target += soft * (small[..., ::1] - target)
            taken.append(box)
            return


def with_a_large_face(faces: list[Face], grounds: list[np.ndarray], count: int, seed: int) -> Iterator[bytes]:
    """JPEGs of two faces, of which one has a third of the photo's short side up to nearly all, cut tightly."""
    rng = np.random.default_rng(seed)
    while count:
        width, height = (int(length) for length in rng.integers(1100, 2600, 2, endpoint=True))
        picture = _ground(grounds[rng.integers(len(grounds))], width, height, rng)
        large, around = faces[rng.integers(len(faces))], rng.uniform(0, 0.5)
        rows, columns = (round(side * (AROUND - around) / (1 + 2 * AROUND)) for side in large.pixels.shape[:2])
        tight = Face(large.pixels[rows : len(large.pixels) - rows, columns : large.pixels.shape[1] - columns], large.px)
        taken: list[tuple[int, int, int, int]] = []
        _paste(picture, tight, float(rng.uniform(0.35, 0.95) * min(width, height)), taken, rng)
        _paste(picture, faces[rng.integers(len(faces))], float(rng.uniform(100, 400)), taken, rng)
        if len(taken) == 2:
            count -= 1
            done, data = cv2.imencode(".jpg", np.clip(picture, 0, 255).astype(np.uint8)[..., ::-1])
            assert done
            yield data.tobytes()


def with_others(
    faces: list[Face], grounds: list[np.ndarray], others: list[Face], count: int, seed: int, each: int = 1
) -> Iterator[bytes]:
    """JPEGs of a face and of `each` others, turned, blurred, dark, of 25 to 250 px; some are cut off by the edge.

    `others` may be faces, or what looks like one.
    """
    rng = np.random.default_rng(seed)
    while count:
        width, height = (int(length) for length in rng.integers(1100, 2600, 2, endpoint=True))
        picture = _ground(grounds[rng.integers(len(grounds))], width, height, rng)
        taken: list[tuple[int, int, int, int]] = []
        _paste(picture, faces[rng.integers(len(faces))], float(rng.uniform(140, 400)), taken, rng)
        for _ in range(each):
            px = float(rng.uniform(25, 250))
            other = degraded(_at_most(others[rng.integers(len(others))], px), rng)
            if rng.random() < 0.3:
                other = Face(_turned(other.pixels, rng.uniform(-180, 180)), other.px)
            if rng.random() < 0.5:
                other = Face(cv2.GaussianBlur(other.pixels, (0, 0), rng.uniform(0.01, 0.12) * other.px), other.px)
            _paste(picture, other, px, taken, rng)
        if len(taken) > 1:
            count -= 1
            x1, _, x2, _ = taken[-1]
            if rng.random() < 0.3 and x1 > taken[0][2]:  # of a face, in its middle, 40 to 90 % is left
                picture = picture[:, : round((x1 + x2) / 2 + rng.uniform(-0.1, 0.4) * px)]
            yield _jpeg(picture, rng)
