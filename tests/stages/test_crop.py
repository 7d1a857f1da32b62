import hashlib
import io
import json
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from skimage import data as samples

from stages.crop import Crop
from stages.pixels.images import decode_jpeg
from stages.runtime import Runtime
from stages.settings import CropSettings, FaceShare, Settings

BBOX = [180.8, 55.7, 270.8, 178.4]
"""The astronaut's face, as SCRFD finds it: 122.7 px high."""


@cache
def enlarged(factor: int) -> tuple[np.ndarray, list[float]]:
    side = 512 * factor
    pixels = np.asarray(Image.fromarray(samples.astronaut()).resize((side, side)))
    return pixels, [edge * factor for edge in BBOX]


def crop(pixels: np.ndarray, bbox: list[float], **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    data = buffer.getvalue()
    table = pa.table({"image": [data], "sha256": [hashlib.sha256(data).hexdigest()], "bbox": [bbox]})
    row = Crop(Settings(crop=CropSettings(**options)), Runtime())(table).to_pylist()[0]
    return row, json.loads(row["crops"])


def test_crops_show_the_face_at_the_configured_shares() -> None:
    pixels, bbox = enlarged(3)
    _, crops = crop(pixels, bbox, face_share=FaceShare(portrait=0.5, half=0.3))
    for name, share in (("portrait", 0.5), ("half", 0.3)):
        x0, y0, x1, y1 = crops[name]["box"]
        assert x1 - x0 == y1 - y0
        assert crops[name]["face_share"] == pytest.approx(share, rel=0.01)
        assert crops[name]["face_share"] == pytest.approx((bbox[3] - bbox[1]) / (y1 - y0), abs=1e-4)
    assert list(crops) == ["portrait", "half", "full"]
    assert crops["full"] == {"box": [0, 0, 1536, 1536], "size": [1536, 1536], "face_share": 0.2396}


def test_files_show_what_the_boxes_say() -> None:
    pixels, bbox = enlarged(3)
    row, crops = crop(pixels, bbox, face_share=FaceShare(half=0.3))
    for name in ("portrait", "half", "full"):
        x0, y0, x1, y1 = crops[name]["box"]
        width, height = crops[name]["size"]
        expected = np.asarray(Image.fromarray(pixels[y0:y1, x0:x1]).resize((width, height), Image.Resampling.BOX))
        shown = decode_jpeg(row[name])
        assert name in row["crops_made"]
        assert shown.shape == (height, width, 3)
        assert np.abs(shown.astype(float) - expected).mean() < 2.5


def test_large_squares_are_reduced_and_small_ones_left() -> None:
    pixels, bbox = enlarged(3)
    _, crops = crop(pixels, bbox, max_size=600, max_long_side=900)
    assert [crops[name]["size"] for name in ("portrait", "full")] == [[600, 600], [900, 900]]
    _, crops = crop(pixels, bbox, max_size=1000)
    x0, _, x1, _ = crops["portrait"]["box"]
    assert crops["portrait"]["size"] == [x1 - x0] * 2 == [737, 737]


def test_full_keeps_the_photo_s_aspect() -> None:
    pixels, bbox = enlarged(3)
    wide = np.concatenate([pixels, pixels[:, :500]], axis=1)
    _, crops = crop(wide, bbox, max_long_side=1018)
    assert crops["full"]["size"] == [1018, 768]


def test_what_is_too_small_is_absent_and_says_why() -> None:
    row, crops = crop(*enlarged(1), face_share=FaceShare(half=0.22), tolerance=0.05)
    assert (row["portrait"], row["half"]) == (None, None)
    assert crops["portrait"] == {"absent": "the crop would be too small: 246 px, the least is 512"}
    assert crops["half"] == {"absent": "the photo is too small: a square of 558 px is wanted, 512 px is there"}
    assert crops["full"]["size"] == [512, 512]


def test_a_face_may_be_a_little_too_large() -> None:
    row, crops = crop(*enlarged(1), face_share=FaceShare(half=0.22), tolerance=0.1)
    assert crops["half"] == {"box": [0, 0, 512, 512], "size": [512, 512], "face_share": 0.2396}
    assert decode_jpeg(row["half"]).shape == (512, 512, 3)


def test_full_is_absent_when_the_face_fills_it() -> None:
    row, crops = crop(*enlarged(2), face_share=FaceShare(full=0.2))
    assert row["full"] is None
    assert crops["full"] == {"absent": "the face fills 0.24 of the photo's height, the most is 0.20"}


def test_full_is_absent_when_its_short_side_would_be_too_small() -> None:
    pixels, bbox = enlarged(1)
    panorama = np.concatenate([pixels] * 5, axis=1)
    row, crops = crop(panorama, bbox)
    assert row["full"] is None
    assert crops["full"] == {
        "absent": "the photo is too narrow: its short side would have 410 px, the least is 512",
    }


def test_same_photo_same_bytes() -> None:
    assert crop(*enlarged(2)) == crop(*enlarged(2))
