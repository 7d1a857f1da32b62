import io

import pyarrow as pa
import pytest
from PIL import Image

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
    return {"format": format, "width": width, "height": height, DROP: drop}


def test_measures_and_keeps() -> None:
    assert measure(saved(64, 100)) == measured("PNG", 64, 100, None)
    assert measure(saved(200, 100, "WEBP")) == measured("WEBP", 200, 100, None)


def test_sides_are_those_of_the_turned_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert measure(saved(100, 70, "JPEG", exif=exif)) == measured("JPEG", 70, 100, None)


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
