import io
import subprocess
import sys
from collections.abc import Callable
from functools import cache

import cv2
import heif
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from skimage import data as samples

from schemas.drops import Dropped, DropReason
from stages.pixels import images
from stages.pixels.headers import Header, check_whole, is_web_page, open_lazily, read_header, sniff
from stages.pixels.images import PhotoCache, thumbnail

SIZE = 96, 80


def decode(data: bytes) -> np.ndarray:
    """The pixels of a file of a stranger, never from a cache."""
    return PhotoCache(0).get("", lambda: data)


@cache
def picture() -> Image.Image:
    """A real photo, not square, all corners different."""
    return Image.fromarray(samples.astronaut()[:400, :480]).resize(SIZE)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def sixteen_bit() -> Image.Image:
    return Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257)


def transparent(mode: str) -> Image.Image:
    """The picture with its left half see-through (and black there)."""
    layer = picture().convert("RGBA")
    layer.paste((0, 0, 0, 0), (0, 0, SIZE[0] // 2, SIZE[1]))
    return layer.convert(mode)


def grey() -> np.ndarray:
    return np.asarray(picture().convert("L").convert("RGB"))


def colour() -> np.ndarray:
    return np.asarray(picture())


FILES: dict[str, tuple[Callable[[], bytes], Callable[[], np.ndarray], float]] = {
    "jpeg": (lambda: saved(picture(), "JPEG", quality=95), colour, 6),
    "jpeg progressive": (lambda: saved(picture(), "JPEG", quality=95, progressive=True), colour, 6),
    "jpeg grey": (lambda: saved(picture().convert("L"), "JPEG", quality=95), grey, 2),
    "jpeg cmyk": (lambda: saved(picture().convert("CMYK"), "JPEG", quality=95), colour, 4),
    "jpeg multi-picture": (
        lambda: saved(picture(), "MPO", quality=95, save_all=True, append_images=[picture()]),
        colour,
        6,
    ),
    "png": (lambda: saved(picture(), "PNG"), colour, 0),
    "png L": (lambda: saved(picture().convert("L"), "PNG"), grey, 0),
    "png LA": (lambda: saved(picture().convert("LA"), "PNG"), grey, 0),
    "png P": (lambda: saved(picture().quantize(256), "PNG"), colour, 6),
    "png RGBA": (lambda: saved(picture().convert("RGBA"), "PNG"), colour, 0),
    "png I;16": (lambda: saved(sixteen_bit(), "PNG"), grey, 0),
    "png 1": (
        lambda: saved(picture().convert("1"), "PNG"),
        lambda: np.asarray(picture().convert("1").convert("RGB")),
        0,
    ),
    "png animated": (lambda: saved(picture(), "PNG", save_all=True, append_images=[Image.new("RGB", SIZE)]), colour, 0),
    "webp": (lambda: saved(picture(), "WEBP", quality=95), colour, 5),
    "webp lossless": (lambda: saved(picture(), "WEBP", lossless=True), colour, 0),
    "webp RGBA": (lambda: saved(picture().convert("RGBA"), "WEBP", lossless=True), colour, 0),
    "webp animated": (
        lambda: saved(picture(), "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", SIZE)]),
        colour,
        0,
    ),
    "gif animated": (lambda: saved(picture(), "GIF", save_all=True, append_images=[Image.new("RGB", SIZE)]), colour, 8),
    "bmp": (lambda: saved(picture(), "BMP"), colour, 0),
    "tiff": (lambda: saved(picture(), "TIFF", compression="tiff_lzw"), colour, 0),
    "tiff cmyk": (lambda: saved(picture().convert("CMYK"), "TIFF"), colour, 1),
    "tiff I;16": (lambda: saved(sixteen_bit(), "TIFF"), grey, 0),
    "tiff I;16 from white": (lambda: tiff(65535 - np.asarray(sixteen_bit()), photometric="miniswhite"), grey, 0),
    "tiff of planes": (
        lambda: tiff(np.moveaxis(colour(), -1, 0), photometric="rgb", planarconfig="separate"),
        colour,
        0,
    ),
    "tiff 16 bit": (lambda: tiff(colour().astype(np.uint16) * 257, photometric="rgb"), colour, 0),
    "heif": (lambda: heif.UPRIGHT, heif.drawn, 2),
}
if features.check("avif"):
    FILES["avif"] = (lambda: saved(picture(), "AVIF", quality=95), colour, 5)


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_picture(name: str) -> None:
    make, expected, tolerance = FILES[name]
    data = make()
    pixels = decode(data)
    assert (pixels.shape, pixels.dtype) == ((SIZE[1], SIZE[0], 3), np.uint8)
    assert np.abs(pixels.astype(int) - expected()).mean() <= tolerance
    assert read_header(data) == Header(name.split()[0].upper(), *SIZE)
    check_whole(data, read_header(data))


@pytest.mark.parametrize(("format", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA"), ("PNG", "P")])
def test_what_is_transparent_becomes_white(format: str, mode: str) -> None:
    layer = transparent("RGBA").quantize(200) if mode == "P" else transparent(mode)
    pixels = decode(saved(layer, format, **({"lossless": True} if format == "WEBP" else {})))
    assert (pixels[:, : SIZE[0] // 2] == 255).all()
    assert pixels[:, SIZE[0] // 2 :].mean() < 200


@pytest.mark.parametrize(
    ("format", "orientation"),
    [
        pytest.param(format, turn, marks=[] if format == "JPEG" or turn in (1, 6, 7) else [pytest.mark.long])
        for format in ("JPEG", "PNG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else []))
        for turn in range(1, 9)
    ],
)
def test_exif_orientations_give_the_same_turned_picture(format: str, orientation: int) -> None:
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = picture().transpose(undo) if undo is not None else picture()
    # 4:4:4, so that the turn does not change which pixels share a colour
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 98}}
    data = saved(stored, format, exif=exif(orientation), **options.get(format, {}))
    assert np.abs(decode(data).astype(int) - colour()).mean() < 4
    assert read_header(data)[1:] == SIZE
    assert sniff(data) == (None if format in ("TIFF", "AVIF") else read_header(data))


def test_a_heif_that_lies_on_its_side_is_turned_once() -> None:
    assert np.abs(decode(heif.TURNED).astype(int) - heif.drawn()).mean() < 2
    assert read_header(heif.TURNED) == Header("HEIF", *SIZE)
    assert sniff(heif.TURNED) is None


def test_without_its_package_heif_is_an_unsupported_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    with pytest.raises(Dropped) as dropped:
        open_lazily("HEIF", heif.UPRIGHT)
    assert dropped.value.reason is DropReason.UNSUPPORTED_FORMAT


@pytest.mark.parametrize("value", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(9), exif(0), exif(6)[:20]])
def test_broken_exif_means_upright(value: bytes) -> None:
    data = saved(picture(), "JPEG", exif=value)
    assert read_header(data) == Header("JPEG", *SIZE)
    assert decode(data).shape == (SIZE[1], SIZE[0], 3)


@pytest.mark.parametrize("name", FILES)
def test_sniff_knows_nothing_or_the_truth_after_every_byte(name: str) -> None:
    data = FILES[name][0]()
    answers = {sniff(data[:length]) for length in range(min(len(data), 1000))}
    assert answers <= {None, read_header(data)}


@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "png", "webp", "webp lossless", "gif animated", "bmp"])
def test_sniff_needs_only_the_first_kilobyte(name: str) -> None:
    assert sniff(FILES[name][0]()[:1024]) is not None


def test_sniff_waits_for_the_exif_of_a_webp() -> None:
    data = saved(picture(), "WEBP", exif=exif(6))
    assert sniff(data[:1000]) is None
    assert sniff(data) == Header("WEBP", SIZE[1], SIZE[0])


def test_a_webp_may_announce_an_exif_that_it_has_not() -> None:
    data = bytearray(saved(picture(), "WEBP", lossless=True, exif=exif(6)))
    start = data.index(b"EXIF")
    del data[start : start + 8 + int.from_bytes(data[start + 4 : start + 8], "little")]
    data[4:8] = (len(data) - 8).to_bytes(4, "little")
    assert read_header(bytes(data)) == Header("WEBP", *SIZE)
    assert (decode(bytes(data)) == np.asarray(picture())).all()
    assert sniff(bytes(data[:30])) is None


WEB_PAGES = [
    b"<!DOCTYPE html><html>",
    b"\xef\xbb\xbf\r\n<HTML lang=en>",
    b"  <html><body><svg></svg>",
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>',
    b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0">',
    b'{"error": "not found"}',
    b"[]",
]
SVGS = [
    b"<svg xmlns='http://www.w3.org/2000/svg'></svg>",
    b"<?xml version='1.0'?>\n<!-- Inkscape --><svg:svg></svg:svg>",
    b'<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN"><svg></svg>',
    b"<!-- made by hand -->\n<svg>",
]


@pytest.mark.parametrize("page", WEB_PAGES)
def test_web_pages_are_seen_by_their_first_bytes(page: bytes) -> None:
    assert is_web_page(page)
    assert reason_of(page) == DropReason.NOT_AN_IMAGE


@pytest.mark.parametrize("svg", SVGS)
def test_svg_is_an_image_of_an_unsupported_format(svg: bytes) -> None:
    assert not is_web_page(svg)
    assert not is_web_page(svg[:12])
    assert reason_of(svg) == DropReason.UNSUPPORTED_FORMAT


@pytest.mark.parametrize(
    "format", ["PPM", "ICO", "JPEG2000", "DDS", "EPS", pytest.param("ICNS", marks=pytest.mark.long), "QOI"]
)
def test_formats_that_pillow_could_read_are_still_unsupported(format: str) -> None:
    assert reason_of(saved(picture(), format)) == DropReason.UNSUPPORTED_FORMAT


@pytest.mark.parametrize(
    "head", [b"8BPS\0\1", b"\0\0\0\x18ftyphevc\0\0\0\0", b"\0\0\0\x0cJXL \r\n", b"\xff\x0a\xfa\x1f"]
)
def test_formats_that_nothing_here_reads_are_unsupported(head: bytes) -> None:
    assert reason_of(head + bytes(100)) == DropReason.UNSUPPORTED_FORMAT


def test_pixels_that_mean_no_colours_are_unsupported() -> None:
    assert reason_of(saved(Image.new("F", SIZE), "TIFF")) == DropReason.UNSUPPORTED_FORMAT
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(picture(), to_lab)
    assert lab is not None
    assert reason_of(saved(lab, "TIFF")) == DropReason.UNSUPPORTED_FORMAT
    twelve_bits = bytearray(saved(picture(), "JPEG"))
    twelve_bits[twelve_bits.index(b"\xff\xc0") + 4] = 12
    assert reason_of(bytes(twelve_bits)) == DropReason.UNSUPPORTED_FORMAT
    assert sniff(bytes(twelve_bits)) is None


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"hello", b"BMW and Audi: which one?", b"%PDF-1.7", bytes(500), b"RIFF\1\0\0\0WAVE"]
)
def test_anything_else_is_not_an_image(data: bytes) -> None:
    assert reason_of(data) == DropReason.NOT_AN_IMAGE
    assert sniff(data) is None
    assert thumbnail(data, 32) is None


@pytest.mark.parametrize("kind", ["float32", "uint16 planes", "uint16 grey alpha"])
def test_a_tiff_that_no_decoder_here_reads_is_no_damaged_one(kind: str) -> None:
    """Of planes of 16 bits Pillow makes another picture, in silence."""
    deep = colour().astype(np.uint16) * 257
    data = {
        "float32": lambda: tiff((colour() / 255).astype(np.float32), photometric="rgb"),
        "uint16 planes": lambda: tiff(np.moveaxis(deep, -1, 0), photometric="rgb", planarconfig="separate"),
        "uint16 grey alpha": lambda: tiff(deep[..., :2], photometric="minisblack", extrasamples=["unassalpha"]),
    }[kind]()
    with pytest.raises(Dropped) as dropped:
        read_header(data)
    assert dropped.value.reason is DropReason.UNSUPPORTED_FORMAT


HAS_AN_END = ["jpeg", "jpeg progressive", "jpeg cmyk", "png", "png P", "png I;16", "webp", "webp animated", "bmp"]


@pytest.mark.parametrize("name", HAS_AN_END)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9, 0.999])
def test_a_file_without_its_end_is_truncated(name: str, share: float) -> None:
    data = FILES[name][0]()
    assert reason_of(data[: int(len(data) * share)]) == DropReason.TRUNCATED_IMAGE


def test_the_end_of_an_embedded_thumbnail_is_not_the_end_of_the_photo() -> None:
    small = saved(picture().resize((48, 40)), "JPEG")
    photo = saved(picture(), "JPEG", quality=95)
    app1 = b"\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small
    with_thumbnail = photo[:2] + app1 + photo[2:]
    assert small.endswith(b"\xff\xd9")
    assert decode(with_thumbnail).shape == (SIZE[1], SIZE[0], 3)
    assert reason_of(with_thumbnail[:-400]) == DropReason.TRUNCATED_IMAGE
    assert reason_of(with_thumbnail[: len(app1) + 2]) == DropReason.TRUNCATED_IMAGE


def test_bytes_after_the_end_do_no_harm() -> None:
    for name in ("jpeg", "png", "webp"):
        data = FILES[name][0]()
        assert (decode(data + b"\0garbage\xff\xd8" * 50) == decode(data)).all()


def test_a_picture_whose_pixels_do_not_match_its_header_is_corrupt() -> None:
    data = bytearray(saved(picture(), "WEBP", exif=exif(1)))
    data[24] += 8  # canvas width
    assert reason_of(bytes(data)) == DropReason.CORRUPT_IMAGE
    tags = ImageFileDirectory_v2()
    tags[700] = (
        b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'  # Pillow turns by this on load only
    )
    assert reason_of(saved(picture(), "TIFF", tiffinfo=tags)) == DropReason.CORRUPT_IMAGE


def test_a_bomb_is_measured_but_not_decoded() -> None:
    data = bytearray(saved(Image.new("1", (64, 64)), "GIF"))
    data[6:10] = b"\xff\xff\xff\xff"
    assert read_header(bytes(data)) == Header("GIF", 65535, 65535)
    assert thumbnail(bytes(data), 64) is None


@cache
def seeds() -> list[bytes]:
    return [make() for name, (make, _, _) in FILES.items() if name not in ("avif", "heif")]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_no_bytes_raise_anything_but_a_drop(draw: st.DataObject) -> None:
    damaged = bytearray(draw.draw(st.sampled_from(seeds())))
    reach = min(len(damaged), draw.draw(st.sampled_from([32, 400, 100_000])))
    for place, value in draw.draw(st.lists(st.tuples(st.integers(0, reach - 1), st.integers(0, 255)), max_size=8)):
        damaged[place] = value
    data = bytes(damaged[: draw.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))])
    early = sniff(data)
    is_web_page(data)
    try:
        header = read_header(data)
    except Dropped:
        assert early is None
        return
    assert early == (None if header.format == "TIFF" else header)
    if header.width * header.height <= 4_000_000:
        assert reason_of(data) in (None, DropReason.TRUNCATED_IMAGE, DropReason.CORRUPT_IMAGE)
        thumbnail(data, 16)


def test_what_libjpeg_prints_goes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    broken = bytearray(saved(picture(), "JPEG", quality=95))
    broken[1500:1600] = b"\x13\x57" * 50
    assert reason_of(bytes(broken)) is DropReason.CORRUPT_IMAGE
    with pytest.raises(ValueError, match="JPEG"):
        images.decode_jpeg(bytes(broken))  # one of ours, damaged on a disk: in this process
    assert capfd.readouterr().err == ""


def test_stderr_may_be_closed() -> None:
    load = "import os, sys; from stages.pixels import images"
    code = f"{load}; os.close(2); data = sys.stdin.buffer.read()"
    code += "; print(images.decode_png(images.encode_png(images.decode_jpeg(data))).shape)"
    run = subprocess.run([sys.executable, "-c", code], input=seeds()[0], stdout=subprocess.PIPE, check=True)
    assert run.stdout.decode().strip() == str((SIZE[1], SIZE[0], 3))


def test_opencv_and_pillow_agree_on_jpeg() -> None:
    data = saved(picture(), "JPEG", quality=80, exif=exif(1))
    assert (decode(data) == np.asarray(Image.open(io.BytesIO(data)))).all()
    assert (decode(data)[..., ::-1] == cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)).all()


def test_own_jpegs_keep_colour_at_full_resolution() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2, 0] = 255
    stripes[:, 1::2, 2] = 255
    data = images.encode_jpeg(stripes, 95)
    assert data == images.encode_jpeg(stripes.copy(), 95)
    assert np.abs(images.decode_jpeg(data).astype(int) - stripes).mean() < 4


@pytest.mark.parametrize("side", [40, 100, 101, 400])
def test_own_jpegs_may_come_reduced_but_never_below_what_is_shown(side: int) -> None:
    whole = np.array(picture().resize((600, 400)))
    small = images.decode_jpeg(images.encode_jpeg(whole, 95), side)
    height, width = small.shape[:2]
    assert side <= height <= max(2 * side, 100)
    assert abs(width - height * 3 / 2) < 2
    again = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
    assert np.abs(small.astype(int) - again).mean() < 4


@pytest.mark.parametrize("shape", [(50, 40, 3), (50, 40)])
def test_own_pngs_are_lossless(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert (images.decode_png(images.encode_png(pixels)) == pixels).all()


@pytest.mark.parametrize("read", [images.decode_jpeg, images.decode_png])
@pytest.mark.parametrize("data", [b"", b"<html>", b"\xff\xd8\xff\xe0\0\0", b"\x89PNG\r\n\x1a\n\0\0\0\0IHDR"])
def test_own_decoders_refuse_other_bytes(read: Callable[[bytes], np.ndarray], data: bytes) -> None:
    with pytest.raises(ValueError, match=r"JPEG|not a PNG"):
        read(data)


def test_thumbnail_is_small_upright_and_never_enlarged() -> None:
    large = picture().resize((1200, 1000)).transpose(Image.Transpose.ROTATE_90)
    small = thumbnail(saved(large, "JPEG", exif=exif(6)), 96)
    assert small is not None
    assert np.abs(decode(small).astype(int) - colour()).mean() < 8
    assert decode(thumbnail(saved(picture(), "PNG"), 500) or b"").shape == (SIZE[1], SIZE[0], 3)


def test_shrink_keeps_the_aspect_and_never_enlarges() -> None:
    image = np.zeros((100, 300, 3), np.uint8)
    assert images.shrink(image, 150).shape == (50, 150, 3)
    assert images.shrink(image, 300) is image
    assert images.shrink(np.zeros((1, 5000, 3), np.uint8), 10).shape == (1, 10, 3)


def test_cache_decodes_once_and_forgets_the_least_recent() -> None:
    files = {name: saved(picture(), "PNG") for name in "abc"}
    one = SIZE[0] * SIZE[1] * 3
    cache = PhotoCache(max_bytes=2 * one)
    first = cache.get("a", lambda: files["a"])
    second = cache.get("b", lambda: files["b"])
    assert cache.get("a", lambda: files["a"]) is first
    cache.get("c", lambda: files["c"])
    assert cache.n_bytes == 2 * one
    assert cache.get("a", lambda: files["a"]) is first
    assert cache.get("b", lambda: files["b"]) is not second


def test_photos_are_read_only() -> None:
    image = images.photo("a", saved(picture(), "PNG"))
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0] = 0
    assert images.photo("a", b"not looked at") is image
    assert images.photo_of({"sha256": "a"}) is image  # nor is the file read


def reason_of(data: bytes) -> DropReason | None:
    """Why the road from bytes to pixels drops a file, None when it does not."""
    try:
        check_whole(data, read_header(data))
        decode(data)
    except Dropped as dropped:
        return dropped.reason
    return None
