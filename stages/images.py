"""Image files and their pixels, both ways. RGB, HWC, uint8, EXIF turned.

JPEG pixels are read by OpenCV, all others by Pillow, which gives the same values for JPEG but slower.
Colour profiles are ignored, as OpenCV does. The headers' functions are offered here too.
"""

import os
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from PIL.ImageFile import ImageFile

from schemas.drops import DropReason
from stages.base import Dropped
from stages.headers import (
    DECODER_ERRORS,
    DEEP_MODES,
    OPENERS,
    Header,
    check_whole,
    format_of,
    is_web_page,
    open_lazily,
    read_header,
    read_stored,
    sniff,
    undecodable,
)
from stages.models.base import Image

__all__ = [
    "Header",
    "PhotoCache",
    "check_whole",
    "decode",
    "decode_jpeg",
    "decode_png",
    "encode_jpeg",
    "encode_png",
    "is_web_page",
    "photo",
    "read_header",
    "shrink",
    "sniff",
    "thumbnail",
]

cv2.setNumThreads(1)  # the processes of a run are its parallelism

_CACHE_BYTES = 128 * 2**20
_MAX_THUMBNAIL_PIXELS = 100_000_000
_THUMBNAIL_QUALITY = 85
_PNG_LEVEL = 1
_FULL_COLOUR = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444


def decode(data: bytes) -> Image:
    """The pixels of an image file: (H, W, 3) uint8 RGB, EXIF turned, transparency over white, first frame.

    Raises:
        Dropped: truncated_image or corrupt_image.
    """
    format = format_of(data)
    if format not in OPENERS:
        raise Dropped(DropReason.CORRUPT_IMAGE)
    try:
        stored = read_stored(format, data)
        by_opencv = format == "JPEG" and stored.mode in ("L", "RGB")
        pixels = _jpeg_pixels(data) if by_opencv else _pixels(open_lazily(format, data))
        if pixels.shape != (stored.height, stored.width, 3):
            raise ValueError(f"the header says {stored}, the pixels are {pixels.shape}")
    except DECODER_ERRORS as error:
        raise undecodable(format, data, error) from error
    return _turn(pixels, stored.orientation)


def thumbnail(data: bytes, side: int) -> bytes | None:
    """A JPEG of at most `side` x `side` pixels of any image file, cheaply decoded; None when it cannot be."""
    format = format_of(data)
    if format not in OPENERS:
        return None
    try:
        stored = read_stored(format, data)
        if stored.width * stored.height > _MAX_THUMBNAIL_PIXELS:
            return None
        image = open_lazily(format, data)
        image.draft("RGB", (side, side))  # JPEG decodes at a fraction of its size
        pixels = _turn(_pixels(image), stored.orientation)
    except DECODER_ERRORS:
        return None
    return encode_jpeg(shrink(pixels, side), _THUMBNAIL_QUALITY)


def shrink(image: Image, max_side: int) -> Image:
    """Reduce (H, W, 3) so that its long side is at most `max_side`, by area; smaller images stay as they are."""
    height, width = image.shape[:2]
    factor = max_side / max(height, width)
    if factor >= 1:
        return image
    size = max(1, round(width * factor)), max(1, round(height * factor))
    reduced: Image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return reduced


def encode_jpeg(image: Image, quality: int) -> bytes:
    """(H, W, 3) uint8 RGB as JPEG, colour at full resolution (4:4:4), same bytes for same pixels."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, _FULL_COLOUR]
    return _encode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)


def encode_png(image: Image) -> bytes:
    """(H, W, 3) uint8 RGB, or (H, W) uint8, as PNG: lossless, packed for speed."""
    in_order = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    return _encode(".png", in_order, [cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL])


def decode_jpeg(data: bytes) -> Image:
    """(H, W, 3) uint8 RGB of a JPEG that `encode_jpeg` made.

    Raises:
        ValueError: when the bytes are no JPEG.
    """
    if format_of(data) != "JPEG":
        raise ValueError("not a JPEG")
    return _jpeg_pixels(data)


def decode_png(data: bytes) -> Image:
    """(H, W, 3) uint8 RGB or (H, W) uint8, whichever `encode_png` was given.

    Raises:
        ValueError: when the bytes are no PNG.
    """
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if format_of(data) == "PNG" else None
    if pixels is None:
        raise ValueError("not a PNG")
    return np.ascontiguousarray(pixels[..., ::-1]) if pixels.ndim == 3 else pixels


class PhotoCache:
    """Decoded photos of this process, least recently used out first, bounded in bytes."""

    def __init__(self, max_bytes: int) -> None:
        """Start empty."""
        self._max_bytes = max_bytes
        self._photos: OrderedDict[str, Image] = OrderedDict()
        self.n_bytes = 0

    def get(self, sha256: str, data: bytes) -> Image:
        """`decode(data)`, read-only; decoded anew only when it is not held under `sha256`."""
        if sha256 in self._photos:
            self._photos.move_to_end(sha256)
            return self._photos[sha256]
        image = decode(data)
        image.setflags(write=False)
        self._hold(sha256, image)
        return image

    def _hold(self, sha256: str, image: Image) -> None:
        if image.nbytes > self._max_bytes:
            return
        self._photos[sha256] = image
        self.n_bytes += image.nbytes
        while self.n_bytes > self._max_bytes:
            self.n_bytes -= self._photos.popitem(last=False)[1].nbytes


_CACHE = PhotoCache(_CACHE_BYTES)


def photo(sha256: str, data: bytes) -> Image:
    """`decode(data)`, read-only, from this process's cache: stages that follow each other decode a photo once.

    Raises:
        Dropped: as `decode` does.
    """
    return _CACHE.get(sha256, data)


def _pixels(image: ImageFile) -> Image:
    with _no_stderr(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.load()
        if image.mode in DEEP_MODES:
            grey = np.asarray(image).astype(np.uint32)
            return np.repeat(((grey * 255 + 32767) // 65535).astype(np.uint8)[:, :, None], 3, axis=2)
        if not image.has_transparency_data:
            return np.array(image.convert("RGB"))
        layer = image.convert("RGBA")
        paper = Pillow.new("RGB", layer.size, "white")
        paper.paste(layer, mask=layer.getchannel("A"))
        return np.array(paper)


def _jpeg_pixels(data: bytes) -> Image:
    with _no_stderr():
        pixels: Image | None = cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        )
    if pixels is None:
        raise ValueError("not a decodable JPEG")
    return pixels


_STDERR_LOCK = Lock()


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Mute stderr: libjpeg and libtiff print remarks on corrupt data from C, past every setting of their users."""
    with _STDERR_LOCK:
        try:
            kept = os.dup(2)
        except OSError:  # no stderr to protect
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        sys.stderr.flush()
        os.dup2(nowhere, 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


def _turn(pixels: Image, orientation: int) -> Image:
    """Undo an EXIF orientation: 1 upright, 2-4 mirrored and half turned, 5-8 lying on a side."""
    turned = {
        2: lambda: pixels[:, ::-1],
        3: lambda: pixels[::-1, ::-1],
        4: lambda: pixels[::-1],
        5: lambda: pixels.transpose(1, 0, 2),
        6: lambda: np.rot90(pixels, -1),
        7: lambda: np.rot90(pixels, 2).transpose(1, 0, 2),
        8: lambda: np.rot90(pixels, 1),
    }.get(orientation, lambda: pixels)()
    return np.ascontiguousarray(turned)


def _encode(suffix: str, image: npt.NDArray[np.uint8], options: list[int]) -> bytes:
    done, data = cv2.imencode(suffix, image, options)
    if not done:
        raise ValueError(f"cannot encode {image.shape} as {suffix}")
    return bytes(data)
