"""Pixels of a target: decoded, scaled, cut, mirrored, recoloured."""

import os
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.train.loader.decode import picture
from pipeline.train.loader.plan_sample import Planned

Image = npt.NDArray[np.uint8]
"""(H, W, 3) RGB."""


def image(planned: Planned, suffix: str) -> Image:
    """The target's pixels (H, W, 3), RGB.

    Raises:
        CorruptShardError: when the JPEG cannot be decoded whole.
    """
    resized, (left, top), (width, height) = planned.fit
    found = _scaled(picture(planned.raw, suffix, planned.size, resized), resized)
    found = found[top : top + height, left : left + width]
    if planned.mirror:
        found = mirrored(found)
    return recoloured(found, planned.colour) if planned.colour else found


def _scaled(found: Image, size: tuple[int, int]) -> Image:
    if found.shape[1::-1] == size:
        return found
    shrinks = found.shape[1] > size[0] or found.shape[0] > size[1]
    return np.asarray(cv2.resize(found, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC), np.uint8)


def normalised(found: Image, out: npt.NDArray[np.float32]) -> None:
    """Write pixels (H, W, 3) as (3, H, W) in [-1, 1]."""
    np.multiply(found.transpose(2, 0, 1), np.float32(1 / 127.5), out=out)
    out -= 1


def mirrored(found: Image) -> Image:
    """Left and right exchanged."""
    flipped: Image = _albumentations().augmentations.geometric.functional.hflip(found)
    return flipped


def recoloured(found: Image, factors: tuple[float, float, float]) -> Image:
    """Brightness, contrast and saturation multiplied by factors around 1."""
    functional = _albumentations().augmentations.functional
    found = functional.adjust_brightness_torchvision(np.ascontiguousarray(found), factors[0])
    found = functional.adjust_contrast_torchvision(found, factors[1])
    changed: Image = functional.adjust_saturation_torchvision(found, factors[2])
    return changed


def _albumentations() -> Any:
    """The library; loaded late, since it is slow to load and most variants never need it."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for its newest version
    import albumentations

    return albumentations


def preload() -> None:
    """Load now what mirroring and recolouring need, before processes are forked that would each load it."""
    _albumentations()
