import io

import pyarrow as pa
import pytest
from PIL import Image, PngImagePlugin

from schemas.drops import DropReason
from stages.base import DROP
from stages.runtime import Runtime
from stages.settings import FilterSettings, Settings
from stages.size import Size

SETTINGS = Settings(filter=FilterSettings(min_image_px=64, max_pixels=20_000))


def saved(width: int, height: int, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 50).save(buffer, format, **options)
    return buffer.getvalue()


def measure(data: bytes) -> dict[str, object]:
    return Size(SETTINGS, Runtime())(pa.table({"image": pa.array([data], pa.binary())})).to_pylist()[0]


def measured(format: str | None, width: int | None, height: int | None, drop: DropReason | None) -> dict[str, object]:
    encoded = {"jpeg_quality": None, "ai_mark": None} if drop else {"jpeg_quality": 100, "ai_mark": ""}
    return {"format": format, "width": width, "height": height, **encoded, DROP: drop}


def test_measures_and_keeps() -> None:
    assert measure(saved(64, 100)) == measured("PNG", 64, 100, None)
    assert measure(saved(200, 100, "WEBP")) == measured("WEBP", 200, 100, None)


def test_sides_are_those_of_the_turned_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert measure(saved(100, 70, "JPEG", exif=exif)) == measured("JPEG", 70, 100, None) | {"jpeg_quality": 75}


def test_rows_keep_their_order() -> None:
    files = [saved(70, 80), b"<html>", saved(10, 10), saved(90, 90)]
    table = Size(SETTINGS, Runtime())(pa.table({"image": files}))
    assert table["width"].to_pylist() == [70, None, 10, 90]
    assert table[DROP].to_pylist() == [None, "not_an_image", "small_image", None]


@pytest.mark.parametrize("data", [b"", b"<!doctype html><title>404</title>", b"GIF", bytes(1000)])
def test_drops_not_an_image(data: bytes) -> None:
    assert measure(data) == measured(None, None, None, DropReason.NOT_AN_IMAGE)


@pytest.mark.parametrize("data", [b"<svg></svg>", b"8BPS\0\1" + bytes(50), saved(100, 100, "ICO")])
def test_drops_unsupported_format(data: bytes) -> None:
    assert measure(data) == measured(None, None, None, DropReason.UNSUPPORTED_FORMAT)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_drops_truncated_image(format: str) -> None:
    whole = saved(100, 100, format)
    found = measure(whole[:-10])
    assert found[DROP] == DropReason.TRUNCATED_IMAGE
    if format != "WEBP":
        assert found == measured(format, 100, 100, DropReason.TRUNCATED_IMAGE)
    assert measure(whole)[DROP] is None


def test_drops_truncated_image_when_even_the_header_is_cut() -> None:
    assert measure(saved(100, 100, "JPEG")[:100]) == measured(None, None, None, DropReason.TRUNCATED_IMAGE)


def test_drops_corrupt_image() -> None:
    data = bytearray(saved(100, 100))
    data[16:24] = bytes(8)  # no pixels
    assert measure(bytes(data)) == measured(None, None, None, DropReason.CORRUPT_IMAGE)


def test_drops_too_many_pixels() -> None:
    assert measure(saved(200, 100))[DROP] is None
    assert measure(saved(201, 100)) == measured("PNG", 201, 100, DropReason.TOO_MANY_PIXELS)


def test_drops_too_many_pixels_without_decoding_them() -> None:
    bomb = bytearray(saved(100, 100, "GIF"))
    bomb[6:10] = b"\xff\xff\xff\xff"
    assert measure(bytes(bomb)) == measured("GIF", 65535, 65535, DropReason.TOO_MANY_PIXELS)
    assert Size(Settings(), Runtime())(pa.table({"image": [bytes(bomb)]}))[DROP].to_pylist() == ["too_many_pixels"]


@pytest.mark.parametrize(("width", "height"), [(63, 100), (100, 63), (1, 1)])
def test_drops_small_image(width: int, height: int) -> None:
    assert measure(saved(width, height)) == measured("PNG", width, height, DropReason.SMALL_IMAGE)


def test_a_small_image_is_small_even_when_its_end_is_missing() -> None:
    assert measure(saved(50, 100, "JPEG")[:-10])[DROP] == DropReason.SMALL_IMAGE


def test_the_quality_of_a_jpeg_is_what_it_was_saved_with() -> None:
    for quality in range(1, 101):
        assert measure(saved(64, 64, "JPEG", quality=quality))["jpeg_quality"] == quality
    assert measure(saved(64, 64, "JPEG", quality=80, progressive=True))["jpeg_quality"] == 80
    assert measure(saved(64, 64, "JPEG", qtables=[[3] * 64]))["jpeg_quality"] in range(90, 100), "no table of libjpeg"


def png_with(**texts: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text) if "é" in text else info.add_text(name, text)
    return saved(70, 70, pnginfo=info)


def exif_with(tag: int, value: str | bytes) -> Image.Exif:
    exif = Image.Exif()
    (exif.get_ifd(0x8769) if tag == 0x9286 else exif)[tag] = value
    return exif


SETTINGS_OF_A_GENERATOR = "a dog, é\nSteps: 20, Sampler: Euler a, CFG scale: 7"
COMMENT = b"UNICODE\0" + SETTINGS_OF_A_GENERATOR.encode("utf-16-be")
XMP = b'<x Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/%s"/>'


@pytest.mark.parametrize(
    ("data", "mark"),
    [
        (png_with(parameters=SETTINGS_OF_A_GENERATOR), "stable_diffusion"),
        (png_with(prompt='{"3": {"class_type": "KSampler"}}'), "comfyui"),
        (png_with(invokeai_metadata="{}"), "invokeai"),
        (png_with(Software="NovelAI"), "novelai"),
        (png_with(Software="NovelAI", Title="by ComfyUI and Stable Diffusion"), "novelai"),  # what comes first
        (saved(70, 70, "JPEG", exif=exif_with(0x9286, COMMENT)), "stable_diffusion"),
        (saved(70, 70, "WEBP", exif=exif_with(0x9286, COMMENT)), "stable_diffusion"),
        (saved(70, 70, "JPEG", exif=exif_with(0x0131, "Adobe Firefly")), "firefly"),
        (saved(70, 70, "WEBP", xmp=XMP % b"trainedAlgorithmicMedia"), "trainedAlgorithmicMedia"),
        (saved(70, 70, "JPEG", xmp=XMP % b"trainedAlgorithmicMedia"), "trainedAlgorithmicMedia"),
        (saved(70, 70, "JPEG", xmp=XMP % b"compositeWithTrainedAlgorithmicMedia"), ""),
        (saved(70, 70, "JPEG", xmp=XMP % b"digitalCapture"), ""),
        (saved(70, 70, "JPEG", exif=exif_with(0x0131, "Adobe Photoshop 25.0")), ""),
        (png_with(Software="GIMP", prompt="the sampler has 20 steps"), ""),
        (saved(70, 70, "GIF"), ""),
    ],
)
def test_a_file_that_says_that_a_model_made_it_is_marked(data: bytes, mark: str) -> None:
    assert measure(data)["ai_mark"] == mark


def test_c2pa_counts_where_it_names_a_model() -> None:
    plain = saved(70, 70, "JPEG")
    for source, mark in ((b"trainedAlgorithmicMedia", "trainedAlgorithmicMedia"), (b"digitalCapture", "")):
        box = b"JP\0\1\0\0\0\1jumbc2pa.actions http://cv.iptc.org/newscodes/digitalsourcetype/" + source
        segment = b"\xff\xeb" + (len(box) + 2).to_bytes(2) + box
        assert measure(plain[:2] + segment + plain[2:])["ai_mark"] == mark
