"""Geometry of faces: similarity transforms, aligned crops, label maps between crops, boxes. Pixels, x y, y down."""

from functools import lru_cache
from math import ceil, floor
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import skimage  # imports its parts when they are used: a plan, and who sees no face, is spared half a second

from schemas.arcface import ARCFACE_SIZE, ARCFACE_TEMPLATE
from schemas.arrays import Doubles, Floats, Image, Labels, Mask

Matrix = Doubles
"""(2, 3): maps x y 1 to x y."""

FFHQ_SIZE = 512
FFHQ_TEMPLATE: Floats = np.array(
    [
        [192.98138, 239.94708],
        [318.90277, 240.1936],
        [256.63416, 314.01935],
        [201.26117, 371.41043],
        [313.08905, 371.15118],
    ],
    np.float32,
)
"""(5, 2) points of a 512x512 face framed as in FFHQ, on which face parsers are trained (facexlib)."""

_FFHQ_BORDER = (132, 133, 135)
"""RGB around the photo in FFHQ crops, as facexlib fills it."""

MOST_SIDE = 32_766
"""Pixels, of a picture that OpenCV warps."""


def similarity(kps: npt.ArrayLike, template: npt.ArrayLike) -> Matrix:
    """The (2, 3) similarity that maps kps onto template, both (N, 2), with least squares (Umeyama 1991); read-only.

    Computed in float32 up to the SVD, as insightface's `estimate_norm` does for float32 points.

    Raises:
        ValueError: when the points do not determine it (coincident or not finite).
    """
    points = np.asarray(kps, np.float32)
    if not np.isfinite(points).all():
        raise ValueError("points are not finite")
    return _similarity(points.tobytes(), np.asarray(template, np.float32).tobytes())


@lru_cache(maxsize=4096)
def _similarity(points: bytes, template: bytes) -> Matrix:
    """`similarity` of float32 points: three of them come seven times for each face."""
    source, target = (np.frombuffer(each, np.float32).reshape(-1, 2) for each in (points, template))
    transform = skimage.transform.SimilarityTransform.from_estimate(source, target)
    if not transform:
        raise ValueError(f"points do not determine a similarity: {source.tolist()}")
    matrix: Matrix = transform.params[:2]
    matrix.setflags(write=False)
    return matrix


def norm_matrix(kps: npt.ArrayLike, size: int) -> Matrix:
    """The (2, 3) similarity from the photo to its norm_crop of `size`, a multiple of 112."""
    return similarity(kps, np.array(ARCFACE_TEMPLATE, np.float32) * np.float32(size / ARCFACE_SIZE))


def norm_crop(image: Image, kps: npt.ArrayLike, size: int) -> Image:
    """(size, size, 3) aligned face, bilinear, black outside of the photo: insightface's `face_align.norm_crop`."""
    return _warp(image, norm_matrix(kps, size), size)


def ffhq_matrix(kps: npt.ArrayLike) -> Matrix:
    """The (2, 3) similarity from the photo to its FFHQ-style crop."""
    return similarity(kps, FFHQ_TEMPLATE)


def ffhq_crop(image: Image, kps: npt.ArrayLike) -> Image:
    """(512, 512, 3) aligned face with hair and neck, bilinear, grey outside of the photo: what face parsers expect."""
    return _warp(image, ffhq_matrix(kps), FFHQ_SIZE, _FFHQ_BORDER)


def transform_points(matrix: Matrix, points: npt.ArrayLike) -> Floats:
    """(N, 2) points under a (2, 3) matrix, float32."""
    return (np.asarray(points, np.float64) @ matrix[:, :2].T + matrix[:, 2]).astype(np.float32)


def warp_labels(labels: Labels, kps: npt.ArrayLike, size: int) -> Labels:
    """(512, 512) labels of the FFHQ crop as (size, size) labels of the norm_crop, nearest; 0 outside of the former.

    `kps` are the five points in the photo.
    """
    matrix = norm_matrix(kps, size) @ np.vstack([invert(ffhq_matrix(kps)), [0, 0, 1]])
    return _warp(labels, matrix, size, 0, cv2.INTER_NEAREST)


def inside_photo(kps: npt.ArrayLike, width: int, height: int, size: int) -> Mask:
    """(size, size): which pixels of the norm_crop show the photo of width x height, not the border around it."""
    rows, columns = np.indices((size, size)).reshape(2, -1)
    x, y = transform_points(invert(norm_matrix(kps, size)), np.stack([columns, rows], axis=1)).T
    inside: Mask = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return inside.reshape(size, size)


def foreground(face: Image, mask: Labels, keep: tuple[int, ...], fill: tuple[int, int, int]) -> Image:
    """(H, W, 3) RGB face with every pixel whose label in mask (H, W) is not in `keep` replaced by the RGB `fill`."""
    kept = np.isin(mask, keep)[:, :, None]
    return np.where(kept, face, np.array(fill, np.uint8))


def invert(matrix: Matrix) -> Matrix:
    """The (2, 3) matrix that undoes a (2, 3) matrix."""
    inverse: Matrix = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    return inverse


class Box(NamedTuple):
    """A box in whole pixels: x0 <= x < x1, y0 <= y < y1."""

    x0: int
    y0: int
    x1: int
    y1: int


def crop_box(
    bbox: npt.ArrayLike, width: int, height: int, share: float, tolerance: float, centre: float, min_side: int
) -> Box | str:
    """The square of a photo that shows a face, or why the photo cannot give it, as a sentence.

    `bbox` is the face's box in the photo of width x height; it may reach beyond it. The square lies in the photo, and
    holds all of the face that the photo holds. `share` is face height / side, and may be exceeded by `tolerance`,
    relatively, where the photo is too small; the face's centre is wished for at `centre`, share of the side from the
    top; `min_side` is the smallest side, pixels of the photo.
    """
    x0, y0, x1, y1 = (float(edge) for edge in np.asarray(bbox, np.float64))
    exact = ceil((y1 - y0) / share)
    side = max(1, min(exact, width, height))
    if side < exact and (y1 - y0) / side > share * (1 + tolerance):
        return f"the photo is too small: a square of {exact} px is wanted, {side} px is there"
    if side < min_side:
        return f"the crop would be too small: {side} px, the least is {min_side}"
    across, down = _visible(x0, x1, width), _visible(y0, y1, height)
    if max(across[1] - across[0], down[1] - down[0]) > side:
        return f"the face does not fit into a square of {side} px"
    left = _start((x0 + x1) / 2 - side / 2, across, side, width)
    top = _start((y0 + y1) / 2 - side * centre, down, side, height)
    return Box(left, top, left + side, top + side)


def _visible(low: float, high: float, limit: int) -> tuple[int, int]:
    return min(max(floor(low), 0), limit), max(min(ceil(high), limit), 0)


def _start(wanted: float, face: tuple[int, int], side: int, limit: int) -> int:
    """The start of a stretch of `side` within 0..limit that covers `face`, as near to `wanted` as can be."""
    first, last = max(0, face[1] - side), min(limit - side, face[0])
    return min(max(round(wanted), first), last)


def _warp(
    image: Image,
    matrix: Matrix,
    size: int,
    border: int | tuple[int, int, int] = 0,
    interpolation: int = cv2.INTER_LINEAR,
) -> Image:
    """(size, size, ...) of the image under a (2, 3) matrix, `border` outside of it."""
    if max(image.shape[:2]) > MOST_SIDE:
        image, matrix = _part(image, matrix, size)
    warped: Image = cv2.warpAffine(image, matrix, (size, size), flags=interpolation, borderValue=border)
    return warped


def _part(image: Image, matrix: Matrix, size: int) -> tuple[Image, Matrix]:
    """What of an image a warp shows, thinned out where that is too large too, and the matrix that suits it."""
    ends = -1, size
    shown = transform_points(invert(matrix), [(x, y) for x in ends for y in ends])
    sides = np.array(image.shape[1::-1])
    first = np.clip(np.floor(shown.min(axis=0)) - 1, 0, sides - 1).astype(int)
    last = np.clip(np.ceil(shown.max(axis=0)) + 1, first, sides - 1).astype(int)
    step = -(-int((last - first).max() + 1) // MOST_SIDE)
    part = np.ascontiguousarray(image[first[1] : last[1] + 1 : step, first[0] : last[0] + 1 : step])
    linear = matrix[:, :2]
    return part, np.column_stack([step * linear, linear @ first + matrix[:, 2]])
