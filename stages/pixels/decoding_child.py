"""The process in which files of strangers are decoded; started and fed by `stages.pixels.decoding`.

Arguments: the numbers of its socket, of the file that holds the picture's file, and of the file for its pixels. It ends
when the other end of the socket is closed, at the latest. JPEG pixels are read by simplejpeg (libjpeg-turbo), which
gives OpenCV's values in less time, all others by Pillow. Colour profiles are ignored, as OpenCV does.
"""

import json
import math
import mmap
import os
import re
import resource
import signal
import socket
import sys
import warnings
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image as Pillow
from PIL.ImageFile import ImageFile

from schemas.arrays import Array, Image
from schemas.drops import Dropped, DropReason
from stages.pixels import headers
from stages.pixels.decoding import CPU_S, MEMORY, MESSAGE
from stages.pixels.images import encode_jpeg, shrink, stderr_taken

_MAX_THUMBNAIL_PIXELS = 100_000_000
_PHOTOMETRIC = 262
"""TIFF's tag."""
_THUMBNAIL_QUALITY = 85
_DAMAGE = re.compile(
    r"Corrupt JPEG data: (?:premature end|bad Huffman|found marker|(\d+) extraneous)|Premature end of JPEG"
)
"""What libjpeg says when pixels are lost."""
_EXTRANEOUS = 32
"""Bytes before a marker that tell of damage: after some, the decoder is done too early. A few are harmless padding."""


def main(link: socket.socket, file: int, canvas: int) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C and a closed terminal go to all; the parent decides
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    memory: mmap.mmap | None = None
    link.send(b"ready")
    while message := link.recv(MESSAGE):
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime) + CPU_S  # the next file that takes longer ends this process
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        if memory is None or len(memory) != os.fstat(canvas).st_size:
            memory = mmap.mmap(canvas, 0) if os.fstat(canvas).st_size else None
        request: dict[str, Any] = json.loads(message)
        answer: dict[str, Any]
        try:
            data = os.pread(file, os.fstat(file).st_size, 0)
            if request["op"] == "thumbnail":
                small = thumbnail(data, request["side"]) or b""
                os.pwrite(file, small, 0)
                answer = {"length": len(small)}
            elif request["op"] == "header":
                answer = {"stored": _stored(data)[1]}
            else:
                pixels = np.frombuffer(memory or b"", np.uint8, request["count"])
                answer = {"shape": decode_into(data, pixels, request["factor"])}
        except Dropped as dropped:
            answer = {"reason": str(dropped.reason)}
        except MemoryError:
            answer = {"reason": str(DropReason.DECODER_CRASH)}
        link.send(json.dumps(answer).encode())


def decode_into(data: bytes, canvas: Array, factor: int) -> tuple[int, int]:
    """Write the pixels of an image file into memory of the right length, and return height and width.

    (H, W, 3) uint8 RGB, EXIF turned, transparency over white, first frame; the sides divided by `factor` and rounded
    up.

    Raises:
        Dropped: truncated_image or corrupt_image.
    """
    format, stored = _stored(data)
    upright = canvas.reshape(-(-stored.height // factor), -(-stored.width // factor), 3)
    try:
        if format == "JPEG" and stored.mode in ("L", "RGB"):
            target = upright if stored.orientation == 1 else np.empty_like(upright)
            pixels = _jpeg_pixels(data, target, factor)
        else:
            pixels = _pillow_pixels(_opened(format, data, stored))
            if factor > 1 and pixels.shape[:2] == (stored.height, stored.width):
                pixels = cv2.resize(pixels, upright.shape[1::-1], interpolation=cv2.INTER_AREA)
        if pixels.shape != upright.shape:
            raise ValueError(f"the header says {stored}, the pixels are {pixels.shape}")
    except headers.DECODER_ERRORS as error:
        raise headers.undecodable(format, data, error) from error
    upright = turned(pixels, stored.orientation)
    height, width, _ = upright.shape
    if upright.ctypes.data != canvas.ctypes.data:
        canvas.reshape(upright.shape)[:] = upright
    return height, width


def thumbnail(data: bytes, side: int) -> bytes | None:
    """A JPEG of at most `side` x `side` pixels, cheaply decoded; None where the file has none."""
    try:
        format, stored = _stored(data)
        headers.check_whole(data, headers.Header(format, stored.width, stored.height))
        if stored.width * stored.height > _MAX_THUMBNAIL_PIXELS:
            return None
        image = _opened(format, data, stored)
        image.draft("RGB", (side, side))  # JPEG decodes at a fraction of its size
        pixels = np.ascontiguousarray(turned(_pillow_pixels(image), stored.orientation))
    except (Dropped, *headers.DECODER_ERRORS):
        return None
    return encode_jpeg(shrink(pixels, side), _THUMBNAIL_QUALITY)


def _stored(data: bytes) -> tuple[str, headers.Stored]:
    """Format and header of a file that can be decoded."""
    format = headers.format_of(data)
    if format is None or format not in headers.OPENERS:
        raise Dropped(DropReason.CORRUPT_IMAGE)
    try:
        return format, headers.read_stored(format, data)
    except headers.DECODER_ERRORS as error:
        raise headers.undecodable(format, data, error) from error


def _opened(format: str, data: bytes, stored: headers.Stored) -> ImageFile:
    """Pillow's image, before any pixel has memory: a frame beyond the header's size may be of gigabytes."""
    image = headers.open_lazily(format, data)
    if image.size != (stored.width, stored.height):
        raise ValueError(f"the header says {stored}, the pixels are {image.size}")
    return image


def _pillow_pixels(image: ImageFile) -> Image:
    with stderr_taken(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.load()
        if image.mode in headers.DEEP_MODES:
            grey = np.asarray(image).astype(np.uint32)
            if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # white is 0; Pillow sees to it where bits are 8
                grey = 65535 - grey
            return np.repeat(((grey * 255 + 32767) // 65535).astype(np.uint8)[:, :, None], 3, axis=2)
        if not image.has_transparency_data:
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
        layer = image.convert("RGBA")
        paper = Pillow.new("RGB", layer.size, "white")
        paper.paste(layer, mask=layer.getchannel("A"))
        return np.array(paper)


def _jpeg_pixels(data: bytes, canvas: Image, factor: int) -> Image:
    """`canvas` with the pixels of a JPEG, its sides divided by `factor`; raises ValueError where pixels are lost."""
    least = {} if factor == 1 else {"min_height": canvas.shape[0], "min_width": canvas.shape[1], "min_factor": factor}
    try:
        pixels: Image = simplejpeg.decode_jpeg(data, "RGB", buffer=canvas, **least)
    except ValueError as error:
        damage = _DAMAGE.search(str(error))
        if damage and int(damage[1] or _EXTRANEOUS) >= _EXTRANEOUS:
            raise
        pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=canvas, strict=False, **least)
    return pixels


def turned(pixels: Image, orientation: int) -> Image:
    """A view that undoes an EXIF orientation: 1 upright, 2-4 mirrored and half turned, 5-8 lying on a side."""
    if orientation > 4:
        pixels = pixels.transpose(1, 0, 2)
    flips = (orientation - 1) % 4  # 1: left to right, 2: both, 3: top to bottom
    return pixels[:: -1 if flips > 1 else 1, :: -1 if flips in (1, 2) else 1]


if __name__ == "__main__":
    _socket, _file, _canvas = map(int, sys.argv[1:])
    main(socket.socket(fileno=_socket), _file, _canvas)
