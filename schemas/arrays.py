"""Names for arrays."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Image = npt.NDArray[np.uint8]
"""(H, W, 3) uint8, RGB."""
Grey = npt.NDArray[np.uint8]
"""(H, W) uint8."""
Labels = npt.NDArray[np.uint8]
"""(H, W) uint8: what each pixel shows, by number."""
Hashes = npt.NDArray[np.uint64]
Halves = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
