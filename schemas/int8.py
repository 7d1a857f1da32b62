"""Token features at half the size: int8 with a float16 scale for each 64 channels of a token, as a safetensors file."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from schemas.arrays import Floats, Halves
from schemas.errors import CorruptShardError

GROUP = 64
"""Channels that share a scale; the last group of a token may be smaller. Rounding errs by 1/254 of the group's peak in
each of the 63 others at most: whatever a token holds, its cosine stays above 0.9995, which 128 could not promise."""
_STEPS = 127


class Quantised(NamedTuple):
    """Features of T tokens: value = int8 x scale of its group. Groups that are not finite have the scale nan."""

    int8: npt.NDArray[np.int8]
    """(T, D)."""
    scale: Halves
    """(T, ceil(D / GROUP))."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, D)."""
        return self.int8.shape


def quantise(features: Halves) -> Quantised:
    """Features (T, D) to the nearest of 127 steps to either side; a group that holds a nan or inf has the scale nan."""
    values = features.astype(np.float32, order="C")
    peaks = np.maximum.reduceat(np.abs(values), np.arange(0, values.shape[1], GROUP), axis=1)
    scale = (peaks / _STEPS).astype(np.float16)
    # Rounded up: rounded down, the peak of a group of tiny numbers would need more steps than there are.
    scale = np.where(_STEPS * scale.astype(np.float32) < peaks, np.nextafter(scale, np.float16(np.inf)), scale)
    scale[~np.isfinite(peaks)] = np.nan
    steps = np.repeat(scale.astype(np.float32), GROUP, axis=1)[:, : values.shape[1]]
    exact = np.divide(values, steps, out=np.zeros_like(values), where=steps > 0)
    return Quantised(np.rint(exact).astype(np.int8), scale)


def dequantise(features: Quantised) -> Floats:
    """The values (T, D)."""
    scale = np.repeat(features.scale.astype(np.float32), GROUP, axis=1)
    return features.int8 * scale[:, : features.shape[1]]


def encode_int8(features: Quantised) -> bytes:
    """The bytes of a safetensors file of `int8` and `scale`."""
    return save(features._asdict())


def decode_int8(data: bytes) -> Quantised:
    """The features in the bytes of such a file; a CorruptShardError when they are none."""
    try:
        parts = load(data)
        int8, scale = parts.pop("int8"), parts.pop("scale")
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CorruptShardError(f"not a safetensors file of int8 and scale: {error}") from error
    if parts or int8.dtype != np.int8 or scale.dtype != np.float16 or int8.ndim != 2:
        raise CorruptShardError("it holds other tensors than int8 (T, D) and its float16 scale")
    if scale.shape != (len(int8), -(-int8.shape[1] // GROUP)):
        raise CorruptShardError(f"its scales {scale.shape} are not those of {int8.shape}")
    return Quantised(int8, scale)
