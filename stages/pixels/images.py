"""Image files and their pixels, both ways. RGB, HWC, uint8, EXIF turned.

JPEG pixels are read by OpenCV, all others by Pillow, which gives the same values for JPEG but slower.
Colour profiles are ignored, as OpenCV does. The headers' functions are offered here too.

`photo` and `thumbnail` are for files of strangers: they have them decoded in another process (stages.pixels.decoding).
"""

import os
import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from PIL.ImageFile import ImageFile

from schemas.drops import DropReason
from stages.base import Dropped
from stages.models.backends import Image
from stages.pixels import decoding
from stages.pixels.headers import (
    DECODER_ERRORS,
    DEEP_MODES,
    OPENERS,
    Header,
    Stored,
    check_whole,
    format_of,
    has_png_end,
    is_web_page,
    open_lazily,
    read_header,
    read_stored,
    sniff,
    undecodable,
)

__all__ = [
    "Header",
    "PhotoCache",
    "check_whole",
    "decode",
    "decode_into",
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
    "thumbnail_here",
]

cv2.setNumThreads(1)  # the processes of a run are its parallelism

_CACHE_BYTES = 128 * 2**20
_MAX_THUMBNAIL_PIXELS = 100_000_000
_THUMBNAIL_QUALITY = 85
_PNG_LEVEL = 1
_FULL_COLOUR = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
_AS_STORED = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_DAMAGE = re.compile(
    rb"Corrupt JPEG data: (?:premature end|bad Huffman|found marker|(\d+) extraneous)|Premature end of JPEG"
)
"""What libjpeg prints when pixels are lost."""
_EXTRANEOUS = 32
"""Bytes before a marker that tell of damage: after some, the decoder is done too early. A few are harmless padding."""
_REMARKS = 4096


def decode(data: bytes) -> Image:
    """The pixels of an image file: (H, W, 3) uint8 RGB, EXIF turned, transparency over white, first frame.

    Raises:
        Dropped: truncated_image or corrupt_image.
    """
    _, stored = _known(data)
    canvas = np.empty(stored.height * stored.width * 3, np.uint8)
    file = decoding.shared_file(0)
    try:
        os.write(file, data)
        shape = decode_into(data, canvas, f"/dev/fd/{file}")
    finally:
        os.close(file)
    return canvas.reshape(*shape, 3)


def decode_into(data: bytes, canvas: npt.NDArray[np.uint8], path: str) -> tuple[int, int]:
    """As `decode`, into memory of the right length; `path` is a file with the same bytes. Returns height and width.

    Raises:
        Dropped: truncated_image or corrupt_image.
    """
    format, stored = _known(data)
    upright = canvas.reshape(stored.height, stored.width, 3)
    try:
        if format == "JPEG" and stored.mode in ("L", "RGB"):
            pixels = _jpeg_file(path, upright if stored.orientation == 1 else np.empty_like(upright))
        else:
            pixels = _pixels(_opened(format, data, stored))
        if pixels.shape != upright.shape:
            raise ValueError(f"the header says {stored}, the pixels are {pixels.shape}")
    except DECODER_ERRORS as error:
        raise undecodable(format, data, error) from error
    turned = _turned(pixels, stored.orientation)
    height, width, _ = turned.shape
    if turned.ctypes.data != canvas.ctypes.data:
        canvas.reshape(turned.shape)[:] = turned
    return height, width


def _known(data: bytes) -> tuple[str, Stored]:
    """Format and header of a file that can be decoded."""
    format = format_of(data)
    if format is None or format not in OPENERS:
        raise Dropped(DropReason.CORRUPT_IMAGE)
    try:
        return format, read_stored(format, data)
    except DECODER_ERRORS as error:
        raise undecodable(format, data, error) from error


def thumbnail(data: bytes, side: int) -> bytes | None:
    """A JPEG of at most `side` x `side` pixels of any image file, cheaply decoded; None when it cannot be."""
    return decoding.thumbnail(data, side) if format_of(data) in OPENERS else None


def thumbnail_here(data: bytes, side: int) -> bytes | None:
    """As `thumbnail`, in this process."""
    format = format_of(data)
    if format not in OPENERS:
        return None
    try:
        stored = read_stored(format, data)
        check_whole(data, Header(format, stored.width, stored.height))
        if stored.width * stored.height > _MAX_THUMBNAIL_PIXELS:
            return None
        image = _opened(format, data, stored)
        image.draft("RGB", (side, side))  # JPEG decodes at a fraction of its size
        pixels = np.ascontiguousarray(_turned(_pixels(image), stored.orientation))
    except (Dropped, *DECODER_ERRORS):
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
    if format_of(data) != "PNG" or not has_png_end(data):  # a chunk that claims 4 GB would get them
        raise ValueError("not a PNG")
    with _no_stderr():
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
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
        """What `decode(data)` gives, read-only; decoded anew only when it is not held under `sha256`."""
        if sha256 in self._photos:
            self._photos.move_to_end(sha256)
            return self._photos[sha256]
        image = _decode_apart(data)
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
    """What `decode(data)` gives, read-only, from this process's cache: stages in a row decode a photo once.

    Raises:
        Dropped: as `decode` does; decoder_crash when the file kills its decoder, or takes it too long.
    """
    return _CACHE.get(sha256, data)


def _decode_apart(data: bytes) -> Image:
    if format_of(data) not in OPENERS:
        raise Dropped(DropReason.CORRUPT_IMAGE)
    header = read_header(data)
    return decoding.pixels(data, header.width * header.height * 3)


def _opened(format: str, data: bytes, stored: Stored) -> ImageFile:
    """Pillow's image, before any pixel has a place: a frame beyond the header's size may be of gigabytes."""
    image = open_lazily(format, data)
    if image.size != (stored.width, stored.height):
        raise ValueError(f"the header says {stored}, the pixels are {image.size}")
    return image


def _pixels(image: ImageFile) -> Image:
    with _no_stderr(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.load()
        if image.mode in DEEP_MODES:
            grey = np.asarray(image).astype(np.uint32)
            return np.repeat(((grey * 255 + 32767) // 65535).astype(np.uint8)[:, :, None], 3, axis=2)
        if not image.has_transparency_data:
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
        layer = image.convert("RGBA")
        paper = Pillow.new("RGB", layer.size, "white")
        paper.paste(layer, mask=layer.getchannel("A"))
        return np.array(paper)


def _jpeg_pixels(data: bytes) -> Image:
    with _no_stderr():
        pixels: Image | None = cv2.imdecode(np.frombuffer(data, np.uint8), _AS_STORED)
    if pixels is None:
        raise ValueError("not a decodable JPEG")
    return pixels


def _jpeg_file(path: str, canvas: Image) -> Image:
    """`canvas` with the pixels of a JPEG file, or an array of another shape where the file is not as it says."""
    with _no_stderr() as remarks:
        pixels: Image | None = cv2.imread(path, canvas, _AS_STORED)
        said = remarks()
    if pixels is None:
        raise ValueError("not a decodable JPEG")
    damage = _DAMAGE.search(said)
    if damage and int(damage[1] or _EXTRANEOUS) >= _EXTRANEOUS:
        raise ValueError("libjpeg found damage among the pixels, and filled in grey")
    return canvas if pixels.ctypes.data == canvas.ctypes.data else pixels


_STDERR_LOCK = Lock()


@contextmanager
def _no_stderr() -> Iterator[Callable[[], bytes]]:
    """Take what libjpeg, libpng and libtiff print about corrupt data, from C and past every setting of their users.

    Inside the block the given function returns what was printed.
    """
    with _STDERR_LOCK:
        try:
            kept = os.dup(2)
        except OSError:  # no stderr to protect
            yield bytes
            return
        taken = decoding.shared_file(0)
        sys.stderr.flush()
        os.dup2(taken, 2)
        try:
            yield lambda: os.pread(taken, _REMARKS, 0)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(taken)


def _turned(pixels: Image, orientation: int) -> Image:
    """A view that undoes an EXIF orientation: 1 upright, 2-4 mirrored and half turned, 5-8 lying on a side."""
    return {
        2: lambda: pixels[:, ::-1],
        3: lambda: pixels[::-1, ::-1],
        4: lambda: pixels[::-1],
        5: lambda: pixels.transpose(1, 0, 2),
        6: lambda: np.rot90(pixels, -1),
        7: lambda: np.rot90(pixels, 2).transpose(1, 0, 2),
        8: lambda: np.rot90(pixels, 1),
    }.get(orientation, lambda: pixels)()


def _encode(suffix: str, image: npt.NDArray[np.uint8], options: list[int]) -> bytes:
    done, data = cv2.imencode(suffix, image, options)
    if not done:
        raise ValueError(f"cannot encode {image.shape} as {suffix}")
    return bytes(data)
