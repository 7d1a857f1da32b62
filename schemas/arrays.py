"""Names for arrays."""

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
"""(H, W, 3) uint8, RGB."""
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
