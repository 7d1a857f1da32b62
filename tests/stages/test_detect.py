"""Detect measures; the rules of what the numbers mean are pinned on made-up detections, the rest on real photos."""

from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage import data

from schemas.arcface import pose
from schemas.columns import schema
from schemas.drops import DropReason
from schemas.errors import ContractError
from schemas.record import check
from stages.base import DROP
from stages.detect import Detect, measure
from stages.filter import judge
from stages.models.backends import Faces
from stages.pixels.images import encode_jpeg, encode_png
from stages.runtime import Runtime
from stages.settings import Settings

SETTINGS = Settings.model_validate({"models": {"detector": "haar"}})
ASTRONAUT = np.ascontiguousarray(data.astronaut())


def faces(*found: tuple[float, float, float, float, float]) -> Faces:
    """Faces of (x1, y1, x2, y2, score), with points that tell which box they belong to."""
    rows = np.array(found, np.float32).reshape(-1, 5)
    kps = np.repeat(rows[:, None, :2], 5, axis=1) + 1
    return Faces(rows[:, :4], kps, rows[:, 4])


def run(*images: bytes) -> pa.Table:
    return Detect(SETTINGS, Runtime())(table(*images))


def table(*images: bytes) -> pa.Table:
    digests = [sha256(image).hexdigest() for image in images]
    return pa.table([list(images), digests, [None] * len(images)], schema=schema(Detect.reads))


@pytest.fixture(scope="module")
def measured() -> pa.Table:
    flat = np.full((400, 300, 3), 90, np.uint8)
    return run(encode_jpeg(ASTRONAUT, 95), encode_png(flat), encode_jpeg(ASTRONAUT, 95)[:40_000], b"no image")


def test_photos_that_are_computed_together_keep_their_rows(measured: pa.Table) -> None:
    batches = []

    class Together:
        def __init__(self, detector: Any) -> None:
            self.detect = detector.detect

        def detect_all(self, images: Any, seen: Any) -> list[Faces]:
            assert list(seen) == [None] * len(images)
            batches.append(len(images))
            return [self.detect(image) for image in images]

    detect = Detect(SETTINGS, Runtime())
    detect._detector, detect.batch = Together(detect._detector), 3
    flat = np.full((400, 300, 3), 90, np.uint8)
    photos = [b"no image", encode_png(flat), encode_jpeg(ASTRONAUT, 95), encode_jpeg(ASTRONAUT, 95)[:40_000]]
    found = detect(table(*photos)).to_pylist()
    first, flat_row, cut, broken = measured.to_pylist()
    assert found == [broken, flat_row, first, cut]
    assert batches == [2]


def test_each_thread_has_a_detector_where_it_takes_one_photo_at_a_time() -> None:
    detect, flat = Detect(SETTINGS, Runtime(device="cuda")), np.full((400, 300, 3), 90, np.uint8)
    start = Barrier(3)

    def own(_: int) -> Any:
        start.wait(60)
        detect.computed([(flat, None)])
        return detect._own.detector

    with ThreadPoolExecutor(3) as threads:
        assert len({detect._detector, *threads.map(own, range(3))}) == 4


def test_columns_are_as_declared(measured: pa.Table) -> None:
    check(measured.drop_columns([DROP]), Detect.writes, "detect")
    assert measured.num_rows == 4


def test_a_face_is_measured(measured: pa.Table) -> None:
    row = measured.to_pylist()[0]
    assert row["n_faces"] == 1
    assert row[DROP] is None
    assert row["bbox"] == pytest.approx([181, 56, 271, 178], abs=18)  # what SCRFD gives
    assert row["face_px"] == pytest.approx(row["bbox"][2] - row["bbox"][0])
    assert 0.5 <= row["det_score"] <= 1
    assert row["second_score"] < row["det_score"]
    assert np.shape(row["kps"]) == (5, 2)
    (yaw,), (pitch,), _ = pose(np.array([row["kps"]]))
    assert (row["yaw_deg"], row["pitch_deg"]) == pytest.approx((yaw, pitch), abs=1e-3)
    assert row["eye_px"] == pytest.approx(np.linalg.norm(np.subtract(*row["kps"][:2])), abs=1e-3)


def test_points_that_are_no_face_have_no_angles() -> None:
    one = faces((0, 0, 100, 100, 0.9))
    row = measure(one._replace(kps=np.full((1, 5, 2), 40, np.float32)), 0.5)
    assert (row["yaw_deg"], row["pitch_deg"], row["eye_px"]) == (None, None, 0)


def test_no_face_is_a_measurement_too(measured: pa.Table) -> None:
    row = measured.to_pylist()[1]
    assert row == {**dict.fromkeys((*Detect.writes, DROP)), "n_faces": 0, "second_score": 0.0}


def test_drops_truncated_image(measured: pa.Table) -> None:
    assert measured[DROP].to_pylist()[2] == DropReason.TRUNCATED_IMAGE


def test_drops_corrupt_image(measured: pa.Table) -> None:
    assert measured[DROP].to_pylist()[3] == DropReason.CORRUPT_IMAGE


def test_main_face_is_the_largest_certain_one_not_the_best() -> None:
    row = measure(faces((0, 0, 10, 12, 0.9), (50, 50, 150, 180, 0.6), (300, 300, 600, 700, 0.49)), 0.5)
    assert row["bbox"] == [50, 50, 150, 180]
    assert row["kps"][0] == [51, 51]
    assert row["det_score"] == pytest.approx(0.6)
    assert (row["n_faces"], row["face_px"]) == (2, 100)
    assert row["second_score"] == pytest.approx(0.9)


def test_a_score_at_the_threshold_is_a_face() -> None:
    assert measure(faces((0, 0, 10, 10, 0.5)), 0.5)["n_faces"] == 1


@pytest.mark.parametrize(
    ("other", "second"),
    [
        ((40, 40, 60, 60, 0.4), 0.0),  # IoU 0.04, centre inside
        ((40, 0, 180, 100, 0.4), 0.0),  # IoU 0.33, centre outside
        ((80, 0, 180, 100, 0.4), 0.4),  # IoU 0.11, centre outside: another face
        ((500, 500, 520, 520, 0.45), 0.45),
    ],
)
def test_second_score_ignores_the_same_face_seen_twice(other: tuple[float, ...], second: float) -> None:
    row = measure(faces((0, 0, 100, 100, 0.9), other), 0.5)  # type: ignore[arg-type]
    assert row["n_faces"] == 1
    assert row["second_score"] == pytest.approx(second)


def test_without_a_certain_face_the_best_doubtful_one_is_recorded() -> None:
    row = measure(faces((0, 0, 9, 9, 0.3), (20, 20, 40, 40, 0.45)), 0.5)
    assert row == {"n_faces": 0, "second_score": pytest.approx(0.45)}


coordinate = st.floats(-100, 4000, width=32)
boxes = st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate, st.floats(0, 1, width=32)), max_size=6)


@given(boxes, st.randoms(use_true_random=False))
def test_counts_scores_and_order_hold_for_any_boxes(found: list[tuple[float, ...]], random: object) -> None:
    row = measure(faces(*found), 0.5)  # type: ignore[arg-type]
    assert row["n_faces"] == sum(box[4] >= 0.5 for box in found)
    assert 0 <= row["second_score"] <= max((box[4] for box in found), default=0)
    shuffled = list(found)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert measure(faces(*shuffled), 0.5)["n_faces"] == row["n_faces"]  # type: ignore[arg-type]


@pytest.mark.real_data
@pytest.mark.long
def test_haar_agrees_with_the_labels(data: Path, labels: list[dict[str, str]]) -> None:
    settings = Settings.model_validate({"models": {"detector": "haar"}})
    rows = [r for r in labels if min(int(r["width"]), int(r["height"])) >= settings.filter.min_image_px]
    assert len({row["reason"] for row in rows}) == 3, "one face, several and none"
    files = [(data / "photos" / row["file"]).read_bytes() for row in rows]
    wrong = {}
    for row, measured in zip(rows, run(*files).to_pylist(), strict=True):
        reason = judge(measured, settings.filter)
        if (reason is None) != (row["expected"] == "keep"):
            wrong[row["file"]] = reason
    assert not wrong


def test_a_box_without_its_four_numbers_breaks_the_declaration():
    table = pa.table({"bbox": pa.array([[1.0, 2.0, 3.0, 4.0], None, [1.0]], pa.list_(pa.float32()))})
    check(table.slice(0, 2), ("bbox",), "detect")
    with pytest.raises(ContractError, match="bbox holds lists of other sizes"):
        check(table, ("bbox",), "detect")
