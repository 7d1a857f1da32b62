"""Local binary patterns and oriented gradients, projected to the 512 numbers of an ArcFace embedding.

Classical and honest about it: alike pictures of a face come out alike, but it hardly tells identities apart.
Papers: Ahonen, Hadid and Pietikäinen, TPAMI 2006, doi:10.1109/TPAMI.2006.244 (uniform patterns on a grid);
Dalal and Triggs, CVPR 2005, doi:10.1109/CVPR.2005.177 (HOG, by OpenCV).
"""

from functools import cache

import cv2
import numpy as np

from schemas.arrays import Doubles, Floats, Grey, Image
from stages.models.backends import WithoutWeights
from stages.runtime import Device
from stages.settings import ModelSettings

_SIZE = 112
_CELLS = 7
_CELL = _SIZE // _CELLS
_DIMENSIONS = 512
_SEED = 20_060_512
_LEVELS = 256
"""Features and projection are rounded to multiples of 1 / 256: sums of products of integers are exact in float64,
so that a vector does not depend on the order in which a linear algebra library adds, nor on its threads."""


class Lbp(WithoutWeights):
    """Histograms of uniform patterns on a 7x7 grid, and HOG of the same cells, under a random projection."""

    task = "face_embedder"

    def __init__(self, settings: ModelSettings, device: Device) -> None:
        cv2.setNumThreads(1)
        # code -> bin: the 58 codes with at most two changes around the circle have their own, all others share one
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
        uniform = (bits != np.roll(bits, 1, axis=1)).sum(axis=1) <= 2
        self._bins = np.where(uniform, np.cumsum(uniform) - 1, uniform.sum())
        self._hog = cv2.HOGDescriptor((_SIZE, _SIZE), (2 * _CELL, 2 * _CELL), (_CELL, _CELL), (_CELL, _CELL), 9)
        self._projection = _projection(_CELLS**2 * (int(self._bins.max()) + 1) + self._hog.getDescriptorSize())

    def embed(self, faces: Image) -> Floats:
        """(N, 512) float32 of (N, 112, 112, 3) RGB norm_crops; the length is not 1."""
        vectors = []
        n_patterns = int(self._bins.max()) + 1
        for face in faces:
            calm = cv2.GaussianBlur(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY), (3, 3), 0)
            patterns = self._bins[_codes(calm)]
            rows, columns = np.indices(patterns.shape) // _CELL
            cells = ((rows * _CELLS + columns) * n_patterns + patterns).ravel()
            counts = np.bincount(cells, minlength=_CELLS**2 * n_patterns).reshape(-1, n_patterns)
            gradients = np.asarray(self._hog.compute(calm), np.float64).reshape((_CELLS - 1) ** 2, -1)
            # square roots of the shares of each pattern in each cell, so that distances are Hellinger's
            described = np.concatenate([_distinct(np.sqrt(counts / _CELL**2)), _distinct(gradients)])
            vectors.append((np.rint(described * _LEVELS) @ self._projection / _LEVELS**2).astype(np.float32))
        return np.array(vectors, np.float32).reshape(-1, _DIMENSIONS)


@cache
def _projection(n_features: int) -> Doubles:
    """Drawn once a process, however often models are loaded in it; not to be written to."""
    normal = np.random.Generator(np.random.PCG64(_SEED)).standard_normal((n_features, _DIMENSIONS), np.float32)
    projection: Doubles = np.rint(normal * np.float32(_LEVELS)).astype(np.float64)
    return projection


def _distinct(cells: Doubles) -> Doubles:
    """(cells, features) less their mean over the cells, flat: what all skin has in common tells no face."""
    return np.ravel(cells - cells.mean(axis=0))


def _codes(grey: Grey) -> Grey:
    """Per pixel the 8 neighbours, in a circle, that are at least as bright: one bit each; edges are repeated."""
    padded = np.pad(grey, 1, mode="edge")
    height, width = grey.shape
    codes = np.zeros(grey.shape, np.uint8)
    circle = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))
    for bit, (row, column) in enumerate(circle):
        neighbour = padded[row : row + height, column : column + width]
        codes |= (neighbour >= grey).astype(np.uint8) << np.uint8(bit)
    return codes
