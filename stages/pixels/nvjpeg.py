"""JPEG files decoded on a GPU by nvJPEG, through torchvision, where `models.decoding = gpu` asks for it.

Values differ from those of `stages.pixels.decoding` by a few grey levels, and no damage among the scans is noticed. It
decodes the files of strangers in this very process: one that crashes nvJPEG takes the process with it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

from schemas.arrays import Image
from schemas.errors import PlanError
from stages.models.torch_backend import DEVICE, Together, prepare, to_host
from stages.pixels.decoding_child import turned
from stages.pixels.headers import format_of, read_stored
from stages.pixels.images import decode_jpeg, encode_jpeg

_LEVELS = 1.0
"""By which a smooth picture may differ in the mean; photos differ by 0.14 to 0.30."""


class NvJpeg:
    """Takes files of several threads at a time."""

    def __init__(self, decode: Callable[[list[Any]], Sequence[Any]] | None = None) -> None:
        """`decode` makes (3, H, W) RGB uint8 tensors of files as tensors; raises RuntimeError when it cannot make one.

        Raises:
            PlanError: when there is no nvJPEG, or it gives another picture.
        """
        self._decode = decode or _by_torchvision()
        self._together = Together(self._decoded)
        noise = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
        data = encode_jpeg(np.asarray(cv2.resize(noise, (160, 128), interpolation=cv2.INTER_CUBIC), np.uint8), 95)
        for image in self._decoded(None, [data, data]):
            if image is None or np.abs(image.astype(float) - decode_jpeg(data)).mean() > _LEVELS:
                raise PlanError("nvJPEG does not decode as it should here: set models.decoding = cpu.")

    def __call__(self, data: bytes) -> Image | None:
        """(H, W, 3) RGB of a file that has a header, EXIF turned; None for what is to be decoded elsewhere."""
        if format_of(data) != "JPEG" or (stored := read_stored("JPEG", data)).mode not in ("L", "RGB"):
            return None
        (image,) = self._together([(None, data)])
        if image is None or image.shape != (stored.height, stored.width, 3):
            return None
        return turned(image, stored.orientation).copy()  # photos stay for long: not in pinned memory

    def _decoded(self, kind: None, files: list[bytes]) -> list[Image | None]:
        import torch

        given = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
        try:
            with DEVICE:
                return [to_host(image.permute(1, 2, 0).contiguous()) for image in self._decode(given)]
        except torch.cuda.OutOfMemoryError:  # so called in torch 2.4 too
            raise
        except RuntimeError:  # one that cannot be decoded spoils the batch
            return [None] if len(files) == 1 else [image for data in files for image in self._decoded(kind, [data])]


def _by_torchvision() -> Callable[[list[Any]], Sequence[Any]]:
    prepare("cuda")
    from torchvision import io  # type: ignore[import-untyped]

    return lambda files: io.decode_jpeg(files, mode=io.ImageReadMode.RGB, device="cuda")
