import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from skimage import data as samples

from schemas.drops import DropReason
from stages.align import FACE_SIZE, Align
from stages.models.onnx import session_options
from stages.pixels.images import decode_jpeg, photo
from stages.runtime import Runtime
from stages.settings import Settings

KPS = [[204.4, 100.8], [247.3, 103.1], [223.5, 128.4], [201.2, 138.5], [246.4, 140.6]]
"""The astronaut's face, as SCRFD finds it."""


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def align(data: bytes, kps: object = KPS, **limits: float) -> dict[str, Any]:
    table = pa.table({"image": [data], "sha256": [hashlib.sha256(data).hexdigest()], "kps": [kps]})
    return Align(Settings.model_validate({"filter": limits}), Runtime())(table).to_pylist()[0]


def reference(image: np.ndarray, kps: object, size: int) -> np.ndarray:
    from insightface.utils import face_align

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return face_align.norm_crop(image, np.asarray(kps, np.float32), size)


def test_crops_are_insightface_s_in_rgb() -> None:
    photo = samples.astronaut()
    row = align(png(photo))
    assert (np.frombuffer(row["face112"], np.uint8).reshape(112, 112, 3) == reference(photo, KPS, 112)).all()
    face = decode_jpeg(row["face"])
    assert face.shape == (FACE_SIZE, FACE_SIZE, 3)
    assert np.abs(face.astype(float) - reference(photo, KPS, 224)).mean() < 0.8
    assert face[100:150, 90:130, 0].mean() > face[100:150, 90:130, 2].mean() + 15  # skin is more red than blue


def test_measures_tell_faces_apart() -> None:
    photo = samples.astronaut()
    sharp, soft, dark = (align(png(p)) for p in (photo, cv2.GaussianBlur(photo, (0, 0), 4), photo // 4))
    assert sharp["sharpness"] > 10 * soft["sharpness"] > 0
    assert sharp["brightness"] == pytest.approx(4 * dark["brightness"], rel=0.02)
    grey = reference(photo, KPS, 224) @ np.array([0.299, 0.587, 0.114])
    assert sharp["brightness"] == pytest.approx(grey.mean(), abs=0.5)
    assert sharp["roll_deg"] == pytest.approx(3.07, abs=0.01)


def drop(measure: str, key: str) -> tuple[str | None, str | None]:
    """Why the astronaut is dropped at just its own value of a measure, and a little beyond it."""
    data = png(samples.astronaut())
    value = float(np.float32(align(data)[measure]))
    beyond = 1.01 if key.startswith("min_") else 0.99
    at, after = (align(data, **{key: value * factor}) for factor in (1, beyond))
    assert after[measure] == align(data)[measure], "the ledger holds it all the same"
    return at["drop"], after["drop"]


def test_drops_blurred() -> None:
    assert drop("sharpness", "min_sharpness") == (None, DropReason.BLURRED)


def test_drops_too_dark() -> None:
    assert drop("brightness", "min_brightness") == (None, DropReason.TOO_DARK)


def test_drops_too_bright() -> None:
    assert drop("brightness", "max_brightness") == (None, DropReason.TOO_BRIGHT)


def test_a_turned_photo_gives_the_same_face_and_another_roll() -> None:
    photo = samples.astronaut()
    upright = align(png(photo))
    turned = align(png(np.ascontiguousarray(np.rot90(photo, -1))), [[511 - y, x] for x, y in KPS])
    difference = decode_jpeg(upright["face"]).astype(float) - decode_jpeg(turned["face"])
    assert np.abs(difference).mean() < 2
    assert turned["roll_deg"] == pytest.approx(upright["roll_deg"] + 90, abs=0.01)


def test_same_photo_same_bytes() -> None:
    assert align(png(samples.astronaut())) == align(png(samples.astronaut()))


def test_an_exif_turn_is_done_before_the_points_are_used() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.rot90(samples.astronaut()).copy()).save(buffer, "PNG", exif=exif)
    assert align(buffer.getvalue())["face112"] == align(png(samples.astronaut()))["face112"]


@pytest.mark.real_data
@pytest.mark.long
def test_real_faces_are_within_a_grey_level_of_insightface(data: Path, labels: list[dict[str, str]]) -> None:
    from insightface.app import FaceAnalysis

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        options = {"providers": ["CPUExecutionProvider"], "sess_options": session_options()}
        app = FaceAnalysis("real", str(data), ["detection"], **options)
        app.prepare(ctx_id=-1, det_size=(320, 320))
    differences = {}
    for label in [label for label in labels if label["expected"] == "keep"]:
        path = data / "photos" / label["file"]
        bgr = cv2.imread(str(path))
        assert (photo(path.name, path.read_bytes())[..., ::-1] == bgr).all()
        for face in app.get(bgr)[:1]:
            row = align(path.read_bytes(), face.kps.tolist())
            assert (
                np.frombuffer(row["face112"], np.uint8).reshape(112, 112, 3) == reference(bgr, face.kps, 112)[..., ::-1]
            ).all()
            theirs = reference(bgr, face.kps, 224)[..., ::-1]
            differences[label["file"]] = np.abs(decode_jpeg(row["face"]).astype(float) - theirs).mean()
    assert len(differences) >= 8
    assert max(differences.values()) <= 0.8, differences
