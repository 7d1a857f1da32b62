"""Every oddity that the web serves has a recorded outcome, at once and without a word on stderr."""

import io
import os
import struct
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import heif
import pytest
from PIL import Image, features
from skimage import data as samples

from schemas.drops import Dropped
from stages.pixels import decoding, headers, images, jpeg
from stages.runtime import Runtime
from stages.settings import Settings
from stages.size import Size

SIDE = 160
TO_ALL = {"filter": {"min_image_px": 1}}
SECONDS = 2.0
"""For one file, of processor time: of this process and of the one that decodes."""


@cache
def picture() -> Image.Image:
    return Image.fromarray(samples.astronaut()).resize((SIDE, SIDE))


def saved(format: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture().convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def animated(format: str, frames: int = 50) -> bytes:
    more = [Image.new("RGB", (SIDE, SIDE), (number, 0, 0)) for number in range(frames)]
    return saved(format, save_all=True, append_images=more)


def cut(content: bytes, share: float = 0.6) -> bytes:
    return content[: int(len(content) * share)]


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(*before: bytes, head: bytes = b"", pixels: bytes = b"", behind: bytes = b"") -> bytes:
    """A PNG of grey, with chunks before its pixels and behind them."""
    head = head or struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0)
    pixels = pixels or zlib.compress(b"\0" * (SIDE + 1) * SIDE)
    parts = (chunk(b"IHDR", head), *before, chunk(b"IDAT", pixels), behind, chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@cache
def bomb(size: int) -> bytes:
    return zlib.compress(bytes(size), 1)


def frame_of(content: bytes, place: int, value: int) -> bytes:
    """A JPEG with another byte in its frame header: 0 precision, 2 low byte of the height, 5 components."""
    start = next(start for marker, start, _ in jpeg.segments(content) if marker in (0xC0, 0xC2))
    return content[: start + place] + bytes([value]) + content[start + place + 1 :]


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is there many times."""
    content = saved("JPEG", quality=90, progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * count + content[-2:]


def damaged(progressive: bool) -> bytes:
    content = bytearray(saved("JPEG", quality=95, progressive=progressive))
    middle = len(content) // 2
    content[middle : middle + 300] = b"\x13\x57" * 150
    return bytes(content)


def tiled() -> bytes:
    """A TIFF of one tile that is said to be of 2^30 x 2^30 pixels."""
    tags = [(256, SIDE), (257, SIDE), (258, 8), (259, 5), (262, 1), (277, 1), (322, 1 << 30), (323, 1 << 30)]
    tags += [(324, 8), (325, 64)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHI", b"II", 42, 72) + b"\x80" * 64 + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def looping() -> bytes:
    """A TIFF whose first page says that the next page is itself."""
    content = bytearray(saved("TIFF"))
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    struct.pack_into("<I", content, start + 2 + 12 * count, start)
    return bytes(content)


def screen(width: int, height: int) -> bytes:
    """A GIF whose screen has another size than its picture."""
    content = bytearray(saved("GIF"))
    struct.pack_into("<HH", content, 6, width, height)
    return bytes(content)


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112], block[0x0100], block[0x0101] = orientation, 9999, 3
    return block.tobytes()


def upside_down() -> bytes:
    """A BMP of 32 bits per pixel, stored from the top."""
    content = bytearray(saved("BMP", "RGBA"))
    struct.pack_into("<i", content, 22, -SIDE)
    return bytes(content)


BROKEN_HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)


def claimed(width: int, height: int) -> bytes:
    """A HEIC whose `ispe` box says so."""
    at = heif.UPRIGHT.index(b"ispe") + 8
    return heif.UPRIGHT[:at] + struct.pack(">II", width, height) + heif.UPRIGHT[at + 8 :]


ZIP = b"PK\3\4" + bytes(26) + b"evil.sh"

FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    # whole pictures, unusual ones
    "jpeg cmyk": ("ok", lambda: saved("JPEG", "CMYK")),
    "jpeg grey": ("ok", lambda: saved("JPEG", "L")),
    "jpeg progressive": ("ok", lambda: saved("JPEG", progressive=True)),
    "jpeg of 100 scans": ("ok", lambda: scans(90)),
    "jpeg, exif lies about the size": ("ok", lambda: saved("JPEG", exif=exif(6))),
    "jpeg, exif of an orientation that does not exist": ("ok", lambda: saved("JPEG", exif=exif(77))),
    "jpeg with fill bytes": ("ok", lambda: saved("JPEG")[:2] + b"\xff" * 100_000 + saved("JPEG")[2:]),
    "jpeg and zip": ("ok", lambda: saved("JPEG") + ZIP),
    "png 16 bit grey": ("ok", lambda: saved("PNG", "I;16")),
    "png 16 bit colour": (
        "ok",
        lambda: png(
            head=struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0), pixels=zlib.compress(bytes((SIDE * 6 + 1) * SIDE))
        ),
    ),
    "png palette": ("ok", lambda: saved("PNG", "P")),
    "png bilevel": ("ok", lambda: saved("PNG", "1")),
    "png alpha": ("ok", lambda: saved("PNG", "RGBA")),
    "png grey alpha": ("ok", lambda: saved("PNG", "LA")),
    "png animated": ("ok", lambda: animated("PNG")),
    "png and html": ("ok", lambda: saved("PNG") + b"<html><script>alert(1)</script>"),
    "png, pixels without end": ("ok", lambda: png(pixels=bomb(100_000_000))),
    "gif animated": ("ok", lambda: animated("GIF")),
    "gif and javascript": ("ok", lambda: saved("GIF") + b"*/=1;alert(1)"),
    "webp animated": ("ok", lambda: animated("WEBP")),
    "webp alpha": ("ok", lambda: saved("WEBP", "RGBA")),
    "bmp from the top": ("ok", upside_down),
    "tiff of many pages": ("ok", lambda: animated("TIFF")),
    "tiff cmyk": ("ok", lambda: saved("TIFF", "CMYK")),
    "tiff 16 bit": ("ok", lambda: saved("TIFF", "I;16")),
    "tiff whose pages are a ring": ("ok", looping),
    # truncated
    "jpeg cut": ("truncated_image", lambda: cut(saved("JPEG"))),
    "jpeg progressive cut": ("truncated_image", lambda: cut(saved("JPEG", progressive=True))),
    "jpeg cut in its header": ("truncated_image", lambda: saved("JPEG")[:100]),
    "jpeg of fill bytes": ("truncated_image", lambda: b"\xff\xd8" + b"\xff" * 20_000_000),
    "png cut": ("truncated_image", lambda: cut(saved("PNG"))),
    "webp cut": ("truncated_image", lambda: cut(saved("WEBP"))),
    "gif cut": ("truncated_image", lambda: cut(saved("GIF"))),
    "bmp cut": ("truncated_image", lambda: cut(saved("BMP"))),
    "tiff cut": ("truncated_image", lambda: cut(saved("TIFF"))),
    # damaged, and traps
    "jpeg damaged": ("corrupt_image", lambda: damaged(False)),
    "jpeg progressive damaged": ("corrupt_image", lambda: damaged(True)),
    "jpeg higher than its pixels": ("corrupt_image", lambda: frame_of(saved("JPEG"), 2, 255)),
    "jpeg lower than its pixels": ("corrupt_image", lambda: frame_of(saved("JPEG"), 2, 32)),
    "jpeg of 3000 scans": ("corrupt_image", lambda: scans(3000)),
    "jpeg of a million segments": ("corrupt_image", lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * 1_000_000),
    "png of a million chunks": ("corrupt_image", lambda: png(chunk(b"zTXt", b"") * 1_000_000)),
    "png, a million chunks behind": ("corrupt_image", lambda: png(behind=chunk(b"zTXt", b"") * 1_000_000)),
    "png, bomb in zTXt": ("corrupt_image", lambda: png(chunk(b"zTXt", b"a\0\0" + bomb(100_000_000)))),
    "png, bomb in iCCP": ("corrupt_image", lambda: png(chunk(b"iCCP", b"a\0\0" + bomb(100_000_000)))),
    "png, bomb in iTXt": (
        "corrupt_image",
        lambda: png(chunk(b"iTXt", b"a\0\1\0\0\0" + bomb(100_000_000))),
    ),
    "png of wrong checksum": ("corrupt_image", lambda: saved("PNG")[:20] + b"\1" + saved("PNG")[21:]),
    "png without pixels": ("corrupt_image", lambda: png(head=struct.pack(">IIBBBBB", 0, SIDE, 8, 0, 0, 0, 0))),
    "png of a palette that is not there": (
        "corrupt_image",
        lambda: png(
            head=struct.pack(">IIBBBBB", SIDE, SIDE, 8, 3, 0, 0, 0), pixels=zlib.compress(bytes((SIDE + 1) * SIDE))
        ),
    ),
    "gif larger than its screen": ("corrupt_image", lambda: screen(SIDE // 2, SIDE // 2)),
    "webp of endless chunks": (
        "corrupt_image",
        lambda: (
            b"RIFF" + struct.pack("<I", 8_000_022) + b"WEBPVP8X\n\0\0\0\x08\0\0\0" + bytes(6) + b"ABCD\0\0\0\0" * 10**6
        ),
    ),
    "tiff of one huge tile": ("corrupt_image", tiled),
    # too large
    "png of 60000 x 60000": ("too_many_pixels", lambda: png(head=struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))),
    "gif of 65535 x 65535": ("too_many_pixels", lambda: screen(65535, 65535)),
    "heic": ("ok", lambda: heif.UPRIGHT),
    "heic by its second brand": ("ok", lambda: heif.UPRIGHT.replace(b"ftypheic", b"ftypmif1")),
    "heic of a head alone": ("corrupt_image", lambda: BROKEN_HEIC),
    "heic cut": ("corrupt_image", lambda: cut(heif.UPRIGHT)),
    "heic that lies about its size": ("corrupt_image", lambda: claimed(9999, 9999)),
    "heic of 60000 x 60000": ("too_many_pixels", lambda: claimed(60000, 60000)),
    # images that are not decoded here
    "jpeg 12 bit": ("unsupported_format", lambda: frame_of(saved("JPEG"), 0, 12)),
    "jpeg of two components": ("unsupported_format", lambda: frame_of(saved("JPEG"), 5, 2)),
    "heic sequence": ("unsupported_format", lambda: BROKEN_HEIC.replace(b"ftypheic", b"ftyphevc")),
    "svg": ("unsupported_format", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>"),
    "ico": ("unsupported_format", lambda: saved("ICO")),
    "jpeg 2000": ("unsupported_format", lambda: saved("JPEG2000")),
    "bigtiff": ("unsupported_format", lambda: b"II+\0\x08\0\0\0" + bytes(500)),
    # none at all
    "nothing": ("not_an_image", bytes),
    "html and jpeg": ("not_an_image", lambda: b"<html><!--" + saved("JPEG")),
    "pdf and jpeg": ("not_an_image", lambda: b"%PDF-1.4\n" + saved("JPEG")),
    "zip and jpeg": ("not_an_image", lambda: ZIP + saved("JPEG")),
    "zeros": ("not_an_image", lambda: bytes(1_000_000)),
    "white space": ("not_an_image", lambda: b" " * 20_000_000),
    "comments that never become an svg": ("not_an_image", lambda: b"<!--" * 1_000_000),
}
if features.check("avif"):
    FILES["avif"] = ("ok", lambda: saved("AVIF"))
    FILES["avif animated"] = ("ok", lambda: animated("AVIF", 3))
    FILES["avif cut"] = ("corrupt_image", lambda: cut(saved("AVIF")))


def outcome(content: bytes) -> str:
    """Why the road from bytes to pixels drops a file, `ok` when it does not."""
    try:
        told = Size(Settings.model_validate(TO_ALL), Runtime()).row({"image": content})
        pixels = images.photo(str(hash(content)), content)
    except Dropped as dropped:
        return str(dropped.reason)
    assert pixels.shape == (told["height"], told["width"], 3)
    return "ok"


def seconds() -> float:
    child = decoding.decoder()._child
    fields = Path(f"/proc/{child._process.pid}/stat").read_text().rpartition(")")[2].split() if child else [0] * 13
    return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    images.photo("warm", saved("PNG"))


@pytest.mark.parametrize("name", FILES)
def test_every_oddity_has_its_outcome(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    expected, make = FILES[name]
    content = make()
    started = seconds()
    headers.sniff(content[:65536])
    headers.is_web_page(content)
    assert outcome(content) == expected
    assert seconds() - started < SECONDS
    images.thumbnail(content, 32)
    assert capfd.readouterr().err == ""
