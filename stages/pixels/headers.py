"""Headers of image files: what a file is, how large its picture is, whether its end has arrived. No pixel is decoded.

All that this process does with the bytes of a stranger takes a bounded number of steps, and no code outside of Python's
own sees them. Where that cannot be had (TIFF, AVIF, HEIF), the header too is read in another process
(`stages.pixels.decoding`). Only this module and `stages.pixels.decoding_child`, which decodes pixels, translate what a
decoder raises, from a closed list.
"""

import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pkgutil import resolve_name
from typing import Any, NamedTuple

import cv2
from PIL import Image as Pillow
from PIL import features
from PIL.ImageFile import ImageFile

from schemas.drops import Dropped, DropReason
from stages.pixels import decoding, jpeg

Pillow.MAX_IMAGE_PIXELS = None  # the cap is filter.max_pixels, judged before any decode
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # broken files are counted as drops, not logged one by one

_PLUGINS = ("Jpeg", "Png", "WebP", "Gif", "Bmp", "Tiff", *(["Avif"] if features.check("avif") else []))


def _heif(file: io.BytesIO) -> ImageFile:
    """The primary image of a HEIF file (HEIC), turned by libheif, and said to be upright; raises SyntaxError."""
    try:
        from pi_heif import HeifImageFile, options  # on first use: few have such a file
    except ModuleNotFoundError as error:
        raise Dropped(DropReason.UNSUPPORTED_FORMAT) from error
    options.DECODE_THREADS = 1
    options.THUMBNAILS = options.DEPTH_IMAGES = options.AUX_IMAGES = False
    image: ImageFile = HeifImageFile(file)
    return image


OPENERS: dict[str, Callable[[io.BytesIO], ImageFile]] = {
    **{name.upper(): resolve_name(f"PIL.{name}ImagePlugin:{name}ImageFile") for name in _PLUGINS},
    "HEIF": _heif,
}

_FORMAT = re.compile(
    rb"(?P<JPEG>\xff\xd8\xff)|(?P<PNG>\x89PNG\r\n\x1a\n)|(?P<WEBP>RIFF....WEBP)|(?P<GIF>GIF8[79]a)"
    rb"|(?P<BMP>BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0)|(?P<TIFF>II\*\0|MM\0\*)|(?P<AVIF>....ftypavi[fs])"
    rb"|(?P<HEIF>....ftyp(?:hei[cimsx]|mif1.{4}(?:.{4}){0,8}?hei[cx]))",
    re.DOTALL,
)
_OTHER_IMAGE = re.compile(
    rb"8BPS|II\+\0|MM\0\+|\0\0[\1\2]\0[^\0]|....ftyp(?:he[iv][cmsx]|m[is]f1)|\0\0\0\x0c(?:jP  |JXL )|\xff\x4f\xff\x51"
    rb"|\xff\x0a|P[1-7]\s|DDS |%!PS|icns|qoif|v/1\x01|gimp xcf|\xd7\xcd\xc6\x9a|BPG\xfb|[\x8a\x8b][MJ]NG",
    re.DOTALL,
)
_WEB_PAGE = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*+(?:[{\[]|(?:<\?xml[^>]*>\s*+)?<(?:!doctype html|(?!svg)[a-z]))",
    re.IGNORECASE,
)
_SVG = re.compile(rb"(?:\xef\xbb\xbf)?\s*+<.{0,4096}?<?svg[\s>:]", re.IGNORECASE | re.DOTALL)

APART = frozenset({"TIFF", "AVIF", "HEIF"})
"""Formats whose header needs a library, or may need any time and memory."""

_CHUNKS = 50_000
"""Steps of a walk over chunks; 50 MB of PNG in chunks of 8 KiB are 6,400."""
_PLAIN_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_FRAMES, _APP1 = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}, 0xE1
"""JPEG's markers."""
DEEP_MODES = frozenset({"I;16", "I;16B", "I;16L"})
_BITS_PER_SAMPLE, _PLANAR_CONFIGURATION = 258, 284
"""TIFF's tags."""

DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, RuntimeError),
    *(struct.error, zlib.error, cv2.error, AssertionError, AttributeError),
)
"""What Pillow and OpenCV raise for bytes that they cannot read: what `PIL.Image.open` expects, and more."""
UNDECODABLE = (DropReason.TRUNCATED_IMAGE, DropReason.CORRUPT_IMAGE, DropReason.DECODER_CRASH)
"""Why a file that is an image has no pixels."""


class Header(NamedTuple):
    format: str
    """JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF or HEIF."""
    width: int
    """After the EXIF turn, pixels."""
    height: int
    """After the EXIF turn, pixels."""


class Stored(NamedTuple):
    """The picture as it lies in the file, before the EXIF turn."""

    width: int
    height: int
    mode: str
    orientation: int


def is_web_page(prefix: bytes) -> bool:
    """Whether these first bytes are HTML, JSON or XML text, never an image; SVG does not count."""
    return _WEB_PAGE.match(prefix) is not None


def sniff(prefix: bytes) -> Header | None:
    """The header, if the first bytes of an image file suffice to know it here; None otherwise. Never raises."""
    format = format_of(prefix)
    if format not in OPENERS or format in APART:
        return None
    try:
        return _header(format, read_stored(format, prefix))
    except (*DECODER_ERRORS, Dropped):
        return None


def read_header(data: bytes) -> Header:
    """The header of a whole image file; pixels are not decoded.

    Raises:
        Dropped: not_an_image, unsupported_format, truncated_image, corrupt_image or decoder_crash.
    """
    format = format_of(data)
    if format not in OPENERS:
        is_image = format is not None or _OTHER_IMAGE.match(data) or (_SVG.match(data) and not is_web_page(data))
        raise Dropped(DropReason.UNSUPPORTED_FORMAT if is_image else DropReason.NOT_AN_IMAGE)
    try:
        stored = Stored(*decoding.decoder().header(data)) if format in APART else read_stored(format, data)
    except DECODER_ERRORS as error:
        raise undecodable(format, data, error) from error
    return _header(format, stored)


def check_whole(data: bytes, header: Header) -> None:
    """Check that an image file has its end, and is no trap for its decoder: cheap, no pixel is decoded.

    Formats without an end mark (GIF, BMP, TIFF, AVIF, HEIF) are left to their decoder.

    Raises:
        Dropped: truncated_image; corrupt_image for a JPEG of too many scans or a PNG of too many chunks.
    """
    if _ends_early(header.format, data):
        raise Dropped(DropReason.TRUNCATED_IMAGE)
    # a decoder would take minutes for what has few pixels
    scans = jpeg.count_scans(data) if header.format == "JPEG" else 0
    is_endless = header.format == "PNG" and sum(1 for _ in chunks("PNG", data)) == _CHUNKS
    if scans > jpeg.MAX_SCANS or is_endless:
        raise Dropped(DropReason.CORRUPT_IMAGE)


def format_of(prefix: bytes) -> str | None:
    """The format that the first bytes show, None for all that is never decoded here."""
    match = _FORMAT.match(prefix)
    return match.lastgroup if match else None


def _header(format: str, stored: Stored) -> Header:
    if stored.mode not in _PLAIN_MODES | DEEP_MODES:
        raise Dropped(DropReason.UNSUPPORTED_FORMAT)
    sizes = stored.width, stored.height
    return Header(format, *(sizes[::-1] if stored.orientation >= 5 else sizes))


def read_stored(format: str, data: bytes) -> Stored:
    """Read the header of a file of a known format; raises one of DECODER_ERRORS when that is impossible."""
    reader = _READERS.get(format)
    if reader is not None:
        stored = reader(data)
    else:
        image = open_lazily(format, data)
        mode = "" if format == "TIFF" and _has_deep_planes(image) else image.mode
        stored = Stored(*image.size, mode, _orientation(image.info.get("exif") or b""))
    if min(stored.width, stored.height) < 1:
        raise ValueError(f"a {format} without pixels")
    return stored


def _has_deep_planes(tiff: Any) -> bool:
    """Whether each colour is by itself, of more than 8 bits and not compressed: Pillow would read bytes for pixels."""
    codec, tags = tiff.tile[0][0], tiff.tag_v2
    is_planar = bool(codec == "raw" and tags.get(_PLANAR_CONFIGURATION) == 2)
    return is_planar and bool(max(tags.get(_BITS_PER_SAMPLE, (1,))) > 8)


def open_lazily(format: str, data: bytes) -> ImageFile:
    """Pillow's image of a file of a known format, before its pixels are loaded; raises one of DECODER_ERRORS."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on broken metadata, which is not used
        return OPENERS[format](io.BytesIO(data))


def _orientation(exif: bytes) -> int:
    """The Orientation (tag 0x0112) of an EXIF block, 1 when there is none or the block is broken."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for position in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, position)
            if tag == 0x0112:
                (value,) = struct.unpack_from(order + {3: "H", 4: "I"}.get(kind, "x"), tiff, position + 8)
                return int(value) if 1 <= value <= 8 else 1
    except (struct.error, ValueError):
        return 1
    return 1


def _jpeg(data: bytes) -> Stored:
    """The frame and the EXIF block before the first scan (ITU T.81, B.2.2)."""
    frame, exif = b"", b""
    for marker, start, end in jpeg.segments(data):
        if marker in _FRAMES and not frame:
            frame = data[start:end]
        elif marker == _APP1 and not exif and data[start : start + 6] == b"Exif\0\0":
            exif = data[start:end]
    depth, height, width, colours = struct.unpack_from(">BHHB", frame)
    return Stored(width, height, _JPEG_MODES.get(colours, "") if depth == 8 else "", _orientation(exif))


def _png(data: bytes) -> Stored:
    """The first chunk (https://www.w3.org/TR/png-3/#11IHDR), and eXIf where it comes before the pixels."""
    kind, width, height, depth, colours, checksum = struct.unpack_from(">12x4sIIBB3xI", data)
    if kind != b"IHDR" or checksum != zlib.crc32(data[12:29]):
        raise ValueError("a PNG that does not begin with its size")
    exif = b""
    for name, start, end in chunks("PNG", data):
        if name == b"eXIf":
            exif = data[start:end]
        elif name == b"IDAT":
            return Stored(width, height, "I;16" if (depth, colours) == (16, 0) else "RGBA", _orientation(exif))
    raise ValueError("the PNG ends before its pixels, or has too many other chunks")


def _gif(data: bytes) -> Stored:
    """The logical screen (https://www.w3.org/Graphics/GIF/spec-gif89a.txt, 18): no frame may reach beyond it."""
    width, height = struct.unpack_from("<6xHH", data)
    return Stored(width, height, "P", 1)


def _webp(data: bytes) -> Stored:
    """Canvas size of a WebP file (https://developers.google.com/speed/webp/docs/riff_container), and its turn.

    Pillow would set up the decoder for the whole canvas, and needs the whole file for it.
    """
    kind = data[12:16]
    if kind == b"VP8X":
        low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", data, 24)
        width, height = 1 + low_width + (high_width << 16), 1 + low_height + (high_height << 16)
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        raise ValueError(f"a WebP file that begins with {kind!r}")
    if kind == b"VP8X" and data[20] & 0x08:  # its header announces EXIF
        for name, start, end in chunks("WEBP", data):
            if name == b"EXIF":
                return Stored(width, height, "RGBA", _orientation(data[start:end]))
        # Some tools take it out and leave the announcement: all chunks are known once the last one reaches the end.
        if end + 1 < 8 + int.from_bytes(data[4:8], "little"):
            raise ValueError("the WebP file ends before its EXIF chunk, or has too many others")
    return Stored(width, height, "RGBA", 1)


_READERS: dict[str, Callable[[bytes], Stored]] = {"JPEG": _jpeg, "PNG": _png, "GIF": _gif, "WEBP": _webp}
"""Formats read without Pillow, which walks over hostile ones for minutes. Its code for BMP has no loop."""


def chunks(format: str, data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the content of each chunk of a PNG or WebP file whose head is there; _CHUNKS at most."""
    is_png = format == "PNG"
    position = 8 if is_png else 12
    for _ in range(_CHUNKS):
        head = data[position : position + 8]
        if len(head) < 8:
            return
        name, size = (head[4:], int.from_bytes(head[:4])) if is_png else (head[:4], int.from_bytes(head[4:], "little"))
        yield name, position + 8, position + 8 + size
        position += 12 + size if is_png else 8 + size + size % 2


def undecodable(format: str, data: bytes, error: Exception) -> Dropped:
    """The drop that a decoder's error stands for: truncated_image, corrupt_image or unsupported_format."""
    if "unknown pixel mode" in str(error):  # Pillow's, of a whole TIFF: of floats, say
        return Dropped(DropReason.UNSUPPORTED_FORMAT)
    truncated = _ends_early(format, data) or "truncated" in str(error).lower()
    return Dropped(DropReason.TRUNCATED_IMAGE if truncated else DropReason.CORRUPT_IMAGE)


def _ends_early(format: str, data: bytes) -> bool:
    if format == "JPEG":
        try:
            # embedded thumbnails have their own end marks, before the first scan of the picture itself
            scan = jpeg.first_scan(data)
        except jpeg.Endless:  # whatever it is, it is not for want of bytes
            return False
        return scan is None or data.rfind(b"\xff\xd9") < scan  # from the end, where it usually is
    if format == "PNG":
        return not has_png_end(data)
    if format == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return False


def has_png_end(data: bytes) -> bool:
    """Whether the chunks of a PNG lead to its last one, or are too many to tell."""
    names = [name for name, _, _ in chunks("PNG", data)]
    return b"IEND" in names or len(names) == _CHUNKS
