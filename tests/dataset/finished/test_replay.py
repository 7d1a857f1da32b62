"""Other thresholds on a ledger give the verdicts of a run by them, of every row that the ledger can judge."""

import random
from collections import Counter
from pathlib import Path

import fake_dataset as fake
import judged_rows
import pyarrow as pa
import pytest
from sample_runs import make
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset.finished.replay import COLUMNS, OUTCOMES, UNJUDGED, evidence, ledgers, replay, thresholds
from pipeline.dataset.out.ledger import funnel
from schemas.columns import KEPT, LEDGER_SCHEMA
from schemas.errors import ExitCode, OutputError, UserError
from stages.filter import QUALITIES
from stages.settings import FilterSettings


def drawn_limits(rng: random.Random) -> FilterSettings:
    return FilterSettings(
        min_image_px=rng.choice([1, 800, 1000, 1001, 1024, 2000]),
        max_pixels=rng.choice([1_000_000, 1_048_576, *[100_000_000] * 4]),
        min_face_px=rng.choice([0, 32, 63.9, 64, 100, 128, 199.99, 200, 499]),
        max_second_score=rng.choice([0, 0.125, 0.3, 0.4, 0.45, 1]),
        **judged_rows.some_qualities(rng),
    )


@pytest.mark.parametrize(("draws", "count"), [(90, 200), pytest.param(400, 300, marks=pytest.mark.long)])
def test_ledgers_are_judged_as_the_stages_would_judge_the_photos(draws, count):
    rng = random.Random(0)
    photos = [judged_rows.photo(rng) for _ in range(count)]
    seen = Counter()
    for _ in range(draws):
        before, after = drawn_limits(rng), drawn_limits(rng)
        rows = [judged_rows.recorded(truth, before) for truth in photos]
        measured = evidence(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA))
        assert [OUTCOMES[n] for n in measured.judged(before, judged_rows.FACTOR)] == [
            "unsure" if row["stage"] == "screen" and before.min_face_px < 16 * judged_rows.FACTOR else row["verdict"]
            for row in rows
        ]
        for truth, row, number in zip(photos, rows, measured.judged(after, judged_rows.FACTOR), strict=True):
            outcome = OUTCOMES[number]
            seen[outcome] += 1
            if outcome == "unseen":
                assert row["verdict"] in ("small_image", "too_many_pixels")
                assert judged_rows.run(truth, after)["verdict"] not in ("small_image",) or row["stage"] == "metadata"
            elif outcome == "unsure":
                assert (row["stage"], row["verdict"]) == ("screen", "no_face")
                assert after.min_face_px < 16 * judged_rows.FACTOR
            elif outcome == "unmeasured":
                assert truth["old"]
                assert None in [row.get(name) for name in judged_rows.LATEST]
            elif outcome == "passes":
                assert row["stage"] in ("filter", *judged_rows.AFTERWARDS)
                assert judged_rows.run(truth, after)["stage"] in (*judged_rows.AFTERWARDS, "pack")
            else:
                assert outcome == judged_rows.run(truth, after)["verdict"]
    reasons = {"small_face", "several_faces", "bad_landmarks", "too_many_pixels", "empty_mask", "bad_embedding"}
    assert {KEPT, *UNJUDGED, *reasons, *(str(quality.reason) for quality in QUALITIES)} <= set(seen)


def ledger_of(out: Path) -> pa.Table:
    return pa.concat_tables(ledgers(out, ("key", *COLUMNS)))


def test_the_sample_replays_to_what_a_run_by_those_thresholds_makes_of_it(whole, tmp_path):
    values = {"min_face_px": 60, "max_second_score": 0.1, "min_image_px": 1050, "max_roll": 3.5, "min_sharpness": 100}
    values |= {"max_brightness": 138.35, "min_embedding_norm": 107}
    assert make(tmp_path / "again", *(f"filter.{key}={value}" for key, value in values.items()))[0] is ExitCode.OK
    limits = FilterSettings.model_validate(values)
    assert thresholds(tmp_path / "again") == (limits, 0)
    again = {row["key"]: row["verdict"] for row in ledger_of(tmp_path / "again").to_pylist()}
    before = ledger_of(whole)
    outcomes = [OUTCOMES[number] for number in evidence(before).judged(limits, 0)]
    changed = set()
    for row, outcome in zip(before.to_pylist(), outcomes, strict=True):
        old, new = row["verdict"], again.pop(row["key"])
        assert outcome == new or (outcome == "passes" and new in (KEPT, "too_bright")), "later stages judge it"
        changed |= {(old, outcome)} if outcome != old else set()
    assert not again
    reasons = ("small_image", "several_faces", "large_roll", "blurred", "too_bright", "weak_embedding")
    assert {("small_face", "passes"), *((KEPT, reason) for reason in reasons)} <= changed


def test_the_same_thresholds_count_as_the_funnel_does(whole):
    limits, factor = thresholds(whole)
    before, after = replay(whole, limits, factor)
    assert before == +after
    assert after[KEPT] == funnel(whole).kept
    for ledger in ledgers(whole, COLUMNS):
        assert [OUTCOMES[n] for n in evidence(ledger).judged(limits, factor)] == ledger["verdict"].to_pylist()


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
        (["--set", "filter.min_sharpness=inf"], "should be a finite number"),
        (["--set", "filter.max_yaw=91"], "less than or equal to 90"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, words, named):
    result = CliRunner().invoke(app, ["replay", str(fake.write(tmp_path, {})), *words])
    assert isinstance(result.exception, UserError)
    assert named in str(result.exception)


def test_a_folder_that_is_no_dataset_is_said_to_be_none(tmp_path):
    result = CliRunner().invoke(app, ["replay", str(tmp_path / "nothing")])
    assert "holds no dataset" in str(result.exception)


def test_a_dataset_json_without_thresholds_is_named(tmp_path):
    out = fake.write(tmp_path, {})
    for text in ("{}", '{"plan": {"settings": {"filter": {}, "models": {"screen": {"factor": Infinity}}}}}'):
        (out / "dataset.json").write_text(text)
        with pytest.raises(OutputError, match=r"dataset\.json does not say"):
            thresholds(tmp_path)
