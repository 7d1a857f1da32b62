"""Other thresholds on a ledger give the verdicts of a run by them, of every row that the ledger can judge."""

import math
import random
from collections import Counter
from pathlib import Path

import fake_dataset as fake
import numpy as np
import pyarrow as pa
import pytest
from sample_runs import make
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset.finished.replay import COLUMNS, OUTCOMES, UNJUDGED, evidence, ledgers, replay, thresholds
from pipeline.dataset.out.ledger import funnel
from schemas.columns import KEPT, LEDGER_SCHEMA
from schemas.errors import ExitCode, OutputError, UserError
from stages.filter import judge
from stages.settings import FilterSettings

FACTOR = 4
LINE = [[480.0 + 30 * i, 350.0 + 30 * i] for i in range(5)]
SINGLE = lambda value: float(np.float32(value))  # noqa: E731 (stages read measurements from columns of float32)
FACE = ("n_faces", "bbox", "kps", "face_px", "second_score")


def photo(rng: random.Random) -> dict:
    """All that could become known of a row, whatever the thresholds."""
    # Few values, on and beside the thresholds below, so that ties are frequent.
    size = lambda: rng.choice([600, 800, 1000, 1001, 1024, 1200, 3000])  # noqa: E731
    return {
        "meta_width": rng.choice([None, size()]),
        "meta_height": rng.choice([None, size()]),
        "metadata": rng.choice([None] * 6 + ["bad_url", "unsafe", "duplicate_url", "removed"]),
        "download": rng.choice([None] * 4 + ["not_found", "timeout"]),
        "early": rng.random() < 0.5,
        "width": size(),
        "height": size(),
        "size": rng.choice([None] * 8 + ["truncated_image", "not_an_image"]),
        "screen": rng.choice([None] * 6 + ["no_face"]),
        "detect": rng.choice([None] * 9 + ["corrupt_image"]),
        "n_faces": rng.choice([0, 1, 1, 1, 1, 1, 2, None]),
        "bbox": fake.BBOX,
        "kps": rng.choice([fake.KPS] * 5 + [LINE]),
        "face_px": rng.choice([None, math.nan, 0.0, 31.5, 32.0, 100.0, 128.0, SINGLE(199.99), 200.0, 500.0]),
        "second_score": rng.choice([None, math.nan, 0.0, 0.125, SINGLE(0.3), SINGLE(0.4), 0.5]),
        "segment": rng.choice([None] * 5 + ["empty_mask"]),
    }


def run(truth: dict, limits: FilterSettings) -> dict:
    """The ledger row that the stages make of a photo."""
    row = {name: truth[name] for name in ("meta_width", "meta_height")}
    small = min(truth["width"], truth["height"]) < limits.min_image_px
    claimed = [value for value in row.values() if value is not None]
    if truth["metadata"] not in (None, "duplicate_url"):
        return row | {"stage": "metadata", "verdict": truth["metadata"]}
    if min(claimed, default=math.inf) < limits.min_image_px:
        return row | {"stage": "metadata", "verdict": "small_image"}
    if truth["metadata"]:
        return row | {"stage": "metadata", "verdict": "duplicate_url"}
    if truth["download"]:
        return row | {"stage": "download", "verdict": truth["download"]}
    if truth["size"] == "not_an_image":
        return row | {"stage": "size", "verdict": "not_an_image"}
    row |= {name: truth[name] for name in ("width", "height")}
    if small:
        return row | {"stage": "download" if truth["early"] else "size", "verdict": "small_image"}
    if truth["width"] * truth["height"] > limits.max_pixels:
        return row | {"stage": "size", "verdict": "too_many_pixels"}
    for stage in ("size", "screen", "detect"):
        if truth[stage]:
            return row | {"stage": stage, "verdict": truth[stage]}
    row |= {name: truth[name] for name in FACE}
    if reason := judge(row, limits):
        return row | {"stage": "filter", "verdict": str(reason)}
    return row | {"stage": "segment" if truth["segment"] else "pack", "verdict": truth["segment"] or KEPT}


def drawn_limits(rng: random.Random) -> FilterSettings:
    return FilterSettings(
        min_image_px=rng.choice([1, 800, 1000, 1001, 1024, 2000]),
        max_pixels=rng.choice([600_000, 1_000_000, 1_048_576, 100_000_000]),
        min_face_px=rng.choice([0, 32, 63.9, 64, 100, 128, 199.99, 200, 499]),
        max_second_score=rng.choice([0, 0.125, 0.3, 0.4, 0.45, 1]),
    )


@pytest.mark.parametrize("seed", range(4))
def test_ledgers_are_judged_as_the_stages_would_judge_the_photos(seed):
    rng = random.Random(seed)
    photos = [photo(rng) for _ in range(300)]
    seen = Counter()
    for _ in range(50):
        before, after = drawn_limits(rng), drawn_limits(rng)
        rows = [run(truth, before) for truth in photos]
        measured = evidence(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA))
        assert [OUTCOMES[n] for n in measured.judged(before, FACTOR)] == [
            "unsure" if row["stage"] == "screen" and before.min_face_px < 16 * FACTOR else row["verdict"]
            for row in rows
        ]
        for truth, row, number in zip(photos, rows, measured.judged(after, FACTOR), strict=True):
            outcome = OUTCOMES[number]
            seen[outcome] += 1
            if outcome == "unseen":
                assert row["verdict"] in ("small_image", "too_many_pixels")
                assert run(truth, after)["verdict"] not in ("small_image",) or row["stage"] == "metadata"
            elif outcome == "unsure":
                assert (row["stage"], row["verdict"]) == ("screen", "no_face")
                assert after.min_face_px < 16 * FACTOR
            elif outcome == "passes":
                assert row["stage"] == "filter"
                assert run(truth, after)["verdict"] in (KEPT, "empty_mask")
            else:
                assert outcome == run(truth, after)["verdict"]
    assert set(UNJUDGED) | {KEPT, "small_face", "several_faces", "bad_landmarks", "too_many_pixels"} <= set(seen)


def ledger_of(out: Path) -> pa.Table:
    return pa.concat_tables(ledgers(out, ("key", *COLUMNS)))


def test_the_sample_replays_to_what_a_run_by_those_thresholds_makes_of_it(whole, tmp_path):
    pairs = ["filter.min_face_px=60", "filter.max_second_score=0.1", "filter.min_image_px=1050"]
    assert make(tmp_path / "again", *pairs)[0] is ExitCode.OK
    limits = FilterSettings(min_face_px=60, max_second_score=0.1, min_image_px=1050)
    again = {row["key"]: row["verdict"] for row in ledger_of(tmp_path / "again").to_pylist()}
    before = ledger_of(whole)
    outcomes = [OUTCOMES[number] for number in evidence(before).judged(limits, 0)]
    changed = set()
    for row, outcome in zip(before.to_pylist(), outcomes, strict=True):
        old, new = row["verdict"], again.pop(row["key"])
        assert outcome == new or (outcome == "passes" and new == KEPT)
        changed |= {(old, outcome)} if outcome != old else set()
    assert not again
    assert {(KEPT, "small_image"), ("small_face", "passes")} <= changed


def test_the_same_thresholds_count_as_the_funnel_does(whole):
    limits, factor = thresholds(whole)
    replayed = replay(whole, limits, factor)
    assert replayed.after(KEPT) == funnel(whole).kept
    assert all(old == new for old, new in replayed.counts)


def test_the_command_says_what_changes_and_what_has_to_be_fetched_again(tmp_path):
    out = fake.write(tmp_path, {"a-00000": fake.mixed("a"), "b-00000": fake.mixed("b")})
    result = CliRunner().invoke(
        app, ["replay", str(out), "--set", "filter.min_face_px=80", "--set", "filter.max_second_score=0.2"]
    )
    assert result.exit_code == 0, result.output
    assert "filter.min_face_px: 128.0 -> 80.0" in result.output
    for line in ("| kept          |      4 |     4 |     +0 |", "| several_faces |      0 |     2 |     +2 |"):
        assert line in result.output
    assert "To be fetched again: 2 rows that may be wanted" in result.output
    assert "2 (passes) pass the thresholds" in result.output


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--set", "filter.min_face=3"], "filter.min_face_px"),
        (["--set", "models.det_thresh=0.3"], "models needs a new run"),
        (["--set", "filter.min_face_px=big"], "filter.min_face_px"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, words, named):
    result = CliRunner().invoke(app, ["replay", str(fake.write(tmp_path, {})), *words])
    assert isinstance(result.exception, UserError)
    assert named in str(result.exception)


def test_a_dataset_json_without_thresholds_is_named(tmp_path):
    (fake.write(tmp_path, {}) / "dataset.json").write_text("{}")
    with pytest.raises(OutputError, match=r"dataset\.json does not say"):
        thresholds(tmp_path)
