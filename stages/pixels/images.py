"""Image files and their pixels, both ways. RGB, HWC, uint8, EXIF turned.

`photo` and `thumbnail` are for files of strangers: they have them decoded in another process (stages.pixels.decoding).
`decode_jpeg` and `decode_png` are for what was encoded here.
"""

import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import cv2
import numpy as np
import simplejpeg

from schemas.arrays import Image
from schemas.drops import Dropped, DropReason
from stages.pixels import decoding
from stages.pixels.headers import OPENERS, format_of, has_png_end, read_header

cv2.setNumThreads(1)  # the processes of a run are its parallelism

_CACHE_BYTES = 128 * 2**20
_THREAD_CACHE_BYTES = 256 * 2**20
"""32 photos of 2.8 megapixels: what a batch on a GPU has at most, where faces are in all of them."""
_PNG_LEVEL = 1


@dataclass
class PhotoCache:
    """Decoded photos of this process's threads, least recently used out first, bounded in bytes."""

    max_bytes: int
    n_bytes: int = 0
    _photos: OrderedDict[str, Image] = field(default_factory=OrderedDict)
    _lock: AbstractContextManager[bool] = field(default_factory=Lock)

    def get(self, sha256: str, read: Callable[[], bytes]) -> Image:
        """The pixels of an image file, (H, W, 3) RGB, read-only; read and decoded only where `sha256` is not held.

        EXIF turned, transparency over white, first frame.

        Raises:
            Dropped: truncated_image, corrupt_image, or decoder_crash when it kills its decoder or takes it too long.
        """
        with self._lock:
            if sha256 in self._photos:
                self._photos.move_to_end(sha256)
                return self._photos[sha256]
        data = read()
        if format_of(data) not in OPENERS:
            raise Dropped(DropReason.CORRUPT_IMAGE)
        header = read_header(data)
        image = _first_choice(data) if _first_choice is not None else None
        if image is None:
            image = decoding.decoder().pixels(data, header.width * header.height * 3)
        image.setflags(write=False)
        with self._lock:
            if image.nbytes <= self.max_bytes and sha256 not in self._photos:
                self._photos[sha256] = image
                self.n_bytes += image.nbytes
            while self.n_bytes > self.max_bytes:
                self.n_bytes -= self._photos.popitem(last=False)[1].nbytes
        return image


_CACHE = PhotoCache(_CACHE_BYTES)
_first_choice: Callable[[bytes], Image | None] | None = None


def set_decoding(threads: int, first_choice: Callable[[bytes], Image | None] | None = None) -> None:
    """Prepare for so many threads, each with a batch of its own: a decoder and a share of the cache for each.

    What `first_choice` gives for a file is its photo; where that is None, it is decoded as ever.
    """
    global _first_choice
    decoding.share(among_threads=threads == 1)
    _CACHE.max_bytes = _CACHE_BYTES if threads == 1 else threads * _THREAD_CACHE_BYTES
    _first_choice = first_choice


def photo(sha256: str, data: bytes) -> Image:
    """`PhotoCache.get` of this process's cache: stages in a row decode a photo once."""
    return _CACHE.get(sha256, lambda: data)


def photo_of(record: Mapping[str, Any]) -> Image:
    """`photo` of a record's `image`, which is read only where the pixels of its `sha256` are not held."""
    return _CACHE.get(record["sha256"], lambda: record["image"])


def reduced(sha256: str, data: bytes, factor: int) -> Image:
    """`photo` with its sides divided by 2, 4 or 8 and rounded up; only a JPEG is cheaper so.

    Raises:
        Dropped: as `PhotoCache.get` does.
    """
    if format_of(data) != "JPEG":
        image = photo(sha256, data)
        size = -(-image.shape[1] // factor), -(-image.shape[0] // factor)
        small: Image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return small
    header = read_header(data)
    count = -(-header.width // factor) * -(-header.height // factor) * 3
    return decoding.decoder().pixels(data, count, factor)


def thumbnail(data: bytes, side: int) -> bytes | None:
    """A JPEG of at most `side` x `side` pixels of any image file, cheaply decoded; None when it cannot be."""
    return decoding.decoder().thumbnail(data, side) if format_of(data) in OPENERS else None


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
    full_colour = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return _encode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality, *full_colour])


def encode_png(image: Image) -> bytes:
    """(H, W, 3) uint8 RGB, or (H, W) uint8, as PNG: lossless, packed for speed."""
    in_order = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    return _encode(".png", in_order, [cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL])


def _encode(suffix: str, image: Image, options: list[int]) -> bytes:
    done, data = cv2.imencode(suffix, image, options)
    if not done:
        raise ValueError(f"cannot encode {image.shape} as {suffix}")
    return bytes(data)


def decode_jpeg(data: bytes, shown_px: int = 0) -> Image:
    """(H, W, 3) uint8 RGB of a JPEG that `encode_jpeg` made.

    Where `shown_px` is given, it may come reduced, which is cheaper, as long as no side is under so many pixels.

    Raises:
        ValueError: when the bytes are no whole JPEG.
    """
    pixels: Image = simplejpeg.decode_jpeg(data, "RGB", min_height=shown_px, min_width=shown_px)
    return pixels


def decode_png(data: bytes) -> Image:
    """(H, W, 3) uint8 RGB or (H, W) uint8, whichever `encode_png` was given; a ValueError for what is no PNG."""
    pixels: Image | None = None
    if format_of(data) == "PNG" and has_png_end(data):  # a chunk that claims 4 GB would get them
        with stderr_taken():
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("not a PNG")
    return np.ascontiguousarray(pixels[..., ::-1]) if pixels.ndim == 3 else pixels


_STDERR_LOCK = Lock()


@contextmanager
def stderr_taken() -> Iterator[None]:
    """Drop what libpng, libtiff and Pillow's libjpeg print of corrupt data, from C and past every setting of theirs."""
    with _STDERR_LOCK:
        try:
            stderr = os.dup(2)
        except OSError:  # there is none
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        sys.stderr.flush()
        os.dup2(nowhere, 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            os.close(nowhere)
