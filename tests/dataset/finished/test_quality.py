"""Of planted persons, a measure on which recognition depends earns its place, and others do not."""

import re

import fake_dataset as fake
import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset.finished.quality import DISCARDED, curve, drawing, judgement, read_faces
from schemas.columns import LATER
from schemas.errors import CorruptShardError, OutputError
from schemas.names import sample_key
from schemas.shard import encode_npy


def photos(persons: int, each: int, **changes) -> list[dict]:
    """Rows of persons whose vectors are noisier the less sharp a photo is; no other measure says anything of that."""
    rng, base = np.random.default_rng(0), fake.record("a", 0)
    rows = []
    for number in range(persons * each):
        person, sharpness = number // each, float(rng.uniform(1, 100))
        vector = np.random.default_rng(person).normal(size=512) + rng.normal(size=512) * (60 / (20 + sharpness))
        measured = {"sharpness": sharpness, "face_px": rng.uniform(100, 500), "brightness": rng.uniform(0, 255)}
        vector = encode_npy((vector / np.linalg.norm(vector)).astype(np.float32))
        known = {"key": sample_key("a", number), "row": number, "person": person * 7 + 1, "arcface": vector}
        rows.append({**base, **known, **measured, **changes})
    return rows


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    rows = photos(60, 5)
    return fake.write(tmp_path_factory.mktemp("quality"), {"a-00000": rows[:150], "a-00001": rows[150:]})


def test_the_measure_on_which_recognition_depends_earns_its_place(planted):
    faces = read_faces(planted)
    assert faces.vectors.shape == (300, 512)
    size, sharpness, brightness = (curve(faces, name, 0.5) for name in ("face_px", "sharpness", "brightness"))
    assert sharpness.missed[0] == size.missed[0], "nothing is discarded yet"
    assert sharpness.missed == sorted(sharpness.missed, reverse=True)
    assert sharpness.missed[-1] < 0.7 * size.missed[-1]
    assert (judgement(sharpness, size), judgement(brightness, size)) == ("better", "no better")


def test_errors_are_those_of_all_pairs(planted):
    faces = read_faces(planted)
    found = curve(faces, "sharpness", 0.5)
    for share, missed, mistaken in zip(DISCARDED, found.missed, found.mistaken, strict=True):
        goodness = faces.goodness["sharpness"]
        stay = [n for n in range(300) if goodness[n] >= sorted(goodness)[round(300 * share)]]
        pairs = [(a, b) for n, a in enumerate(stay) for b in stay[:n]]
        same = [a_b for a_b in pairs if faces.persons[a_b[0]] == faces.persons[a_b[1]]]
        under = sum(faces.vectors[a] @ faces.vectors[b] < 0.5 for a, b in same)
        others = {*pairs} - {*same}
        assert missed == pytest.approx(under / len(same))
        assert mistaken == pytest.approx(
            sum(faces.vectors[a] @ faces.vectors[b] >= 0.5 for a, b in others) / len(others)
        )


def test_a_curve_that_runs_out_of_pairs_ends_with_the_last_it_had(tmp_path):
    """It ended with `nan %`."""
    rows = photos(2, 3)
    for number, row in enumerate(rows):
        row["sharpness"] = float([1, 2, 3, 9, 9, 9][number])  # the worst half is one person
    rows = [{**row, "person": 1 if number < 4 else number} for number, row in enumerate(rows)]
    said = CliRunner().invoke(app, ["quality", str(fake.write(tmp_path, {"a-00000": rows}))])
    assert said.exit_code == 0, said.output
    assert " %, " in said.output
    assert "nan" not in said.output


def test_no_more_photos_are_compared_than_memory_has_room_for(planted, monkeypatch):
    """A shard may hold any number (`group --samples-per-shard`): all of its pairs were held, 25 bytes each."""
    monkeypatch.setattr("pipeline.dataset.finished.quality._MOST", 200)
    assert len(read_faces(planted).persons) == 200


def test_the_table_names_what_earns_its_place_and_what_was_not_measured(planted, tmp_path):
    result = CliRunner().invoke(app, ["quality", str(planted), "--similarity", "0.5"])
    assert result.exit_code == 0, result.output
    assert "300 photos of 60 persons" in result.output
    words = " ".join(result.output.split())
    assert re.search(r"\| sharpness [^a-z]* better", words)
    assert re.search(r"\| sharpness +\| █[▁-█]{10} \| 5\d\.\d\d %, 0\.\d\d % ", result.output), (
        "from the most to nearly none"
    )
    assert "by two standard errors: sharpness." in words
    assert re.search(r"\| brightness [^a-z]* no better", words)
    old = fake.write(tmp_path, {"a-00000": photos(3, 4, **{name: None for name in LATER if name != "person"})})
    result = CliRunner().invoke(app, ["quality", str(old)])
    assert "| jpeg_quality | not measured |" in " ".join(result.output.split())


def test_curves_are_drawn_on_one_scale(planted):
    found = curve(read_faces(planted), "sharpness", 0.5)
    assert [found.drawn[0], found.drawn[2], found.drawn[6]] == found.missed
    assert drawing([0.4, 0.2, float("nan"), 0.0], 0.4) == "█▅ ▁"
    assert drawing([0.0, 0.0], 0.0) == "▁▁"


def test_where_everybody_is_recognised_no_measure_is_called_useless(tmp_path):
    out = fake.write(tmp_path, {"a-00000": photos(3, 4)})
    result = CliRunner().invoke(app, ["quality", str(out), "--similarity", "-1"])
    assert "Every pair of one person is recognised" in result.output
    assert "Of more use" not in result.output


def test_a_dataset_without_persons_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(OutputError, match="no photos of known persons: give what `python -m pipeline group "):
        read_faces(fake.write(tmp_path / "ungrouped", {"a-00000": photos(2, 2, person=None)}))
    with pytest.raises(OutputError, match=r"No person in .* has two photos"):
        read_faces(fake.write(tmp_path / "single", {"a-00000": photos(3, 1)}))
    with pytest.raises(OutputError, match="no ID vectors"):
        read_faces(fake.write(tmp_path / "bare", {"a-00000": photos(2, 2, arcface=None)}))


@pytest.mark.parametrize("vector", [b"torn", encode_npy(np.ones(5, np.float32))])
def test_a_vector_that_is_none_names_its_tar(tmp_path, vector):
    out = fake.write(tmp_path, {"a-00000": [*photos(2, 2)[:3], *photos(2, 2, arcface=vector)[3:]]})
    with pytest.raises(CorruptShardError, match=r"a-00000\.tar: an arcface\.npy is no ID vector"):
        read_faces(out)


def test_shards_that_another_run_finishes_meanwhile_are_left_for_the_next_time(planted, monkeypatch):
    listings = iter([["a-00000"], ["a-00000", "a-00001"]])
    for module in ("quality", "replay"):
        monkeypatch.setattr(f"pipeline.dataset.finished.{module}.shard_names", lambda out: next(listings))
    assert len(read_faces(planted).vectors) == 150
