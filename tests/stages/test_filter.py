"""Filter judges numbers: each reason is provoked, and no missing, undefined or worse measurement ever turns to keep."""

import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.columns import KEPT, schema
from schemas.drops import DropReason
from stages.base import DROP
from stages.filter import QUALITIES, Filter, Quality, judge, spans_a_face
from stages.runtime import Runtime
from stages.settings import FilterSettings, Settings

LIMITS = FilterSettings()
BBOX = [100.0, 100.0, 300.0, 360.0]
KPS = [[150.0, 200.0], [250.0, 202.0], [200.0, 250.0], [160.0, 300.0], [240.0, 302.0]]
KEEPER: dict[str, Any] = {
    "n_faces": 1,
    "bbox": BBOX,
    "kps": KPS,
    "face_px": 200.0,
    "second_score": 0.0,
    "det_score": 0.8,
}


def verdicts(*changes: dict[str, Any], **limits: float) -> list[str | None]:
    table = pa.Table.from_pylist([KEEPER | change for change in changes], schema=schema(Filter.reads))
    stage = Filter(Settings.model_validate({"filter": limits}), Runtime())
    result = stage(table)
    assert result.column_names == [DROP]
    return result[DROP].to_pylist()


def test_keeps_one_large_face() -> None:
    assert verdicts({}, {"face_px": 128.0}, {"second_score": 0.39}) == [None, None, None]


def test_drops_no_face() -> None:
    nothing = {"n_faces": 0, "bbox": None, "kps": None, "face_px": None, "second_score": 0.45}
    assert verdicts(nothing) == [DropReason.NO_FACE]


def test_drops_several_faces() -> None:
    changes = {"n_faces": 2}, {"second_score": 0.41}, {"n_faces": 25, "face_px": 3.0}
    assert verdicts(*changes) == [DropReason.SEVERAL_FACES] * 3


def test_drops_small_face() -> None:
    assert verdicts({"face_px": 127.9}, {"face_px": 5.0}) == [DropReason.SMALL_FACE] * 2


@pytest.mark.parametrize(
    "kps",
    [
        [[200.0, 200.0]] * 5,  # one point
        [[150.0 + 30 * i, 200.0 + 20 * i] for i in range(5)],  # one line
        [[200.0, 200.0], [205.0, 200.0], *KPS[2:]],  # eyes together: a profile
        [[math.nan, 200.0], *KPS[1:]],
        [*KPS[:4], [math.inf, 0.0]],
    ],
)
def test_drops_bad_landmarks(kps: list[list[float]]) -> None:
    assert verdicts({"kps": kps}) == [DropReason.BAD_LANDMARKS]


def test_drops_low_det_score() -> None:
    changes = {"det_score": 0.69}, {"det_score": None}, {"det_score": math.nan}, {"det_score": 0.7}
    assert verdicts(*changes) == [None] * 4, "off by default"
    assert verdicts(*changes, min_det_score=0.65) == [None, *[DropReason.LOW_DET_SCORE] * 2, None]


def nose_at(x: float, y: float) -> dict[str, Any]:
    return {"kps": [*KPS[:2], [x, y], *KPS[3:]]}


def test_drops_large_yaw() -> None:
    assert verdicts(nose_at(240, 250), nose_at(160, 250), {}, max_yaw=20) == [DropReason.LARGE_YAW] * 2 + [None]


def test_drops_large_pitch() -> None:
    assert verdicts(nose_at(200, 285), nose_at(200, 215), {}, max_pitch=20) == [DropReason.LARGE_PITCH] * 2 + [None]


def test_drops_large_roll() -> None:
    turned = [{"kps": [[400 - y, x] for x, y in KPS]}, {"kps": [[y, 400 - x] for x, y in KPS]}]
    assert verdicts(*turned, {}, max_roll=80) == [DropReason.LARGE_ROLL] * 2 + [None]


def test_drops_few_eye_pixels() -> None:
    assert verdicts({}, min_eye_px=100.01) + verdicts({}, min_eye_px=100.03) == [None, DropReason.FEW_EYE_PIXELS]


def test_drops_low_jpeg_quality() -> None:
    changes = {"jpeg_quality": 74}, {"jpeg_quality": 75}, {"jpeg_quality": None}
    assert verdicts(*changes) == [None] * 3
    assert verdicts(*changes, min_jpeg_quality=75) == [DropReason.LOW_JPEG_QUALITY, None, DropReason.LOW_JPEG_QUALITY]


def test_drops_ai_marked() -> None:
    changes = {"ai_mark": "comfyui"}, {"ai_mark": ""}, {"ai_mark": None}
    assert verdicts(*changes) == [None] * 3
    assert verdicts(*changes, max_ai_marks=0) == [DropReason.AI_MARKED, None, DropReason.AI_MARKED]


def test_thresholds_are_the_configured_ones() -> None:
    assert verdicts({"face_px": 150.0}, {"second_score": 0.3}, min_face_px=151, max_second_score=0.2) == [
        DropReason.SMALL_FACE,
        DropReason.SEVERAL_FACES,
    ]


@pytest.mark.parametrize("name", sorted({*KEEPER} - {"det_score"}))
def test_nothing_known_is_never_keep(name: str) -> None:
    assert judge(KEEPER | {name: None}, LIMITS) is not None


@pytest.mark.parametrize("name", ["face_px", "second_score"])
def test_undefined_is_never_keep(name: str) -> None:
    assert judge(KEEPER | {name: math.nan}, LIMITS) is not None


@pytest.mark.parametrize("box", [[100.0, 100.0, 100.0, 100.0], [math.nan] * 4, [300.0, 300.0, 100.0, 100.0]])
def test_a_box_without_extent_holds_no_face(box: list[float]) -> None:
    assert not spans_a_face(box, KPS)


def test_a_face_upside_down_or_turned_spans_a_face() -> None:
    assert spans_a_face(BBOX, [[400 - x, 460 - y] for x, y in KPS])
    assert spans_a_face(BBOX, [[-y, x] for x, y in KPS])


def test_an_empty_table_passes() -> None:
    empty = schema(Filter.reads).empty_table()
    assert Filter(Settings(), Runtime())(empty).num_rows == 0


number = st.one_of(st.none(), st.floats(allow_nan=True), st.floats(0, 1), st.floats(0, 500))
points = st.one_of(
    st.none(), st.just(KPS), st.lists(st.lists(st.floats(), min_size=2, max_size=2), min_size=5, max_size=5)
)
box = st.one_of(st.none(), st.just(BBOX), st.lists(st.floats(), min_size=4, max_size=4))
records = st.fixed_dictionaries(
    {
        "n_faces": st.one_of(st.none(), st.integers(0, 3)),
        "bbox": box,
        "kps": points,
        "face_px": number,
        "second_score": number,
        "det_score": number,
        "jpeg_quality": st.one_of(st.none(), st.integers(0, 100)),
        "ai_mark": st.sampled_from([None, "", "comfyui"]),
    }
)


@given(records, st.floats(0, 400), st.floats(0, 400), st.floats(0, 1), st.floats(0, 1))
def test_stricter_thresholds_never_keep_more(
    record: dict[str, Any], px: float, more_px: float, score: float, less_score: float
) -> None:
    strict = FilterSettings(min_face_px=max(px, more_px), max_second_score=min(score, less_score))
    loose = FilterSettings(min_face_px=min(px, more_px), max_second_score=max(score, less_score))
    if judge(record, strict) is None:
        assert judge(record, loose) is None


@given(records, st.sampled_from([one for one in QUALITIES if one.stage == "filter"]), st.floats(0.01, 0.99))
def test_a_threshold_of_a_quality_only_ever_drops(record: dict[str, Any], quality: Quality, share: float) -> None:
    limit = share if quality.is_least else share * quality.off
    verdict = judge(record, FilterSettings.model_validate({quality.key: limit}))
    assert verdict == judge(record, LIMITS) or (verdict == quality.reason and judge(record, LIMITS) is None)


@given(records)
def test_keep_needs_all_evidence(record: dict[str, Any]) -> None:
    if judge(record, LIMITS) is None:
        assert record["n_faces"] == 1
        assert record["face_px"] >= LIMITS.min_face_px
        assert record["second_score"] <= LIMITS.max_second_score
        assert all(map(math.isfinite, [*record["bbox"], *(value for point in record["kps"] for value in point)]))


def test_a_ledger_replays_to_the_same_verdicts() -> None:
    changes = {}, {"face_px": 50.0}, {"n_faces": 3}, {"kps": [[1.0, 1.0]] * 5}
    ledger = [KEEPER | change for change in changes]
    assert [judge(row, LIMITS) for row in ledger] == verdicts(*changes)
    assert [judge(row, FilterSettings(min_face_px=40)) or KEPT for row in ledger][:2] == [KEPT, KEPT]
