"""What the backends on torch share: imports without network, the device, threads, and pixels as models expect them."""

import os

import numpy as np

from schemas.errors import PlanError
from stages.models.backends import Floats, Image
from stages.runtime import Device

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and standard deviation of pixels in 0..1, RGB."""

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}


def prepare(device: Device) -> None:
    """Make torch ready for a device in this process; call before importing transformers or facexlib.

    One thread on the CPU: parallel work is one process per core, and sums must not depend on the thread count.

    Raises:
        PlanError: when a GPU is asked for and torch has none.
    """
    os.environ.update(_OFFLINE)
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise PlanError(
            "executor.gpus asks for a GPU, but torch has none here: install a CUDA build of torch, or set "
            "executor.gpus = 0."
        )
    torch.set_num_threads(1)


def normalise(images: Image, mean_std: tuple[tuple[float, ...], tuple[float, ...]]) -> Floats:
    """(N, H, W, 3) RGB uint8 -> (N, 3, H, W) float32 with the mean and standard deviation that a model expects."""
    mean, std = (np.array(values, np.float32) for values in mean_std)
    pixels = (images.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
