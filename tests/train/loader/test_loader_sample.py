"""What is drawn for a sample: crops in balance, places that hold the face, points that follow."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_shards as fake
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.train.loader.plan_sample import Balance, Planned, Planner, TargetCrop, random_square
from pipeline.train.loader.reading import Features, Reading
from pipeline.train.loader.shards import Raw, Shard
from pipeline.train.settings import CropWeights, TrainConfig
from schemas.buckets import bucketed, buckets, fit
from schemas.columns import CROPS
from schemas.errors import CorruptShardError

SHARD = Shard("out", Path("out/shards/a-00000.tar"), fake.manifest("a-00000", b"", 1))


def crop(side: int, target: int = 64) -> TargetCrop:
    return TargetCrop((0, 0, side, side), (side, side), fit(side, side, (target, target)))


def picks(weights: dict[str, float], chance_of_half: float, count: int = 3000) -> Counter[str]:
    balance, rng = Balance(CropWeights(**weights)), np.random.default_rng(7)
    found: Counter[str] = Counter()
    for _ in range(count):
        there = {name: crop(100) for name in CROPS if name != "half" or rng.random() < chance_of_half}
        found[balance.pick(there, rng.random())] += 1
    return found


@given(st.tuples(*[st.floats(0.1, 10)] * 3), st.integers(0, 99))
def test_shares_of_crops_are_the_weights(weights: tuple[float, ...], seed: int) -> None:
    balance = Balance(CropWeights(**dict(zip(CROPS, weights, strict=True))))
    rng = np.random.default_rng(seed)
    found = Counter(balance.pick(dict.fromkeys(CROPS, crop(100)), rng.random()) for _ in range(200))
    for name, weight in zip(CROPS, weights, strict=True):
        assert abs(found[name] - 200 * weight / sum(weights)) <= 3


def test_a_crop_that_is_often_absent_is_made_up_for() -> None:
    assert abs(picks({}, 0.4)["half"] - 1000) < 30
    assert abs(picks({}, 0.4)["portrait"] - 1000) < 30


def test_a_crop_that_is_too_rare_is_always_taken_and_the_others_share_the_rest() -> None:
    found = picks({"portrait": 1, "half": 1, "full": 3}, 0.1)
    assert 250 < found["half"] < 350
    assert abs(found["full"] / found["portrait"] - 3) < 0.2


def test_a_crop_of_no_weight_is_never_taken() -> None:
    """A sample that has no other is left out; of such a crop alone, as `full` of a bucket, nobody would know."""
    reading = replace(READING, crops=("portrait", "half"))
    assert {one.crop for one in planned(count=40, reading=reading)} == {"portrait", "half"}
    assert planned(fake.sample(0, has=("full",)), 2, reading) == [None, None]


def test_a_crop_that_would_be_enlarged_is_avoided() -> None:
    balance = Balance(CropWeights())
    there = {"portrait": crop(60), "half": crop(64), "full": crop(63)}
    assert {balance.pick(there, draw / 10) for draw in range(10)} == {"half"}
    assert balance.pick({"portrait": crop(60), "full": crop(63)}, 0.0) == "full"


FACES = st.tuples(st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.02, 1), st.floats(0.02, 1))
DRAWS = st.floats(0, 1, exclude_max=True)


@given(st.integers(64, 300), st.integers(64, 300), FACES, DRAWS, DRAWS)
def test_a_random_square_lies_inside_and_holds_the_face(
    width: int, height: int, face: tuple[float, ...], x: float, y: float
) -> None:
    x0, y0 = face[0] * width, face[1] * height
    box = (x0, y0, min(width, x0 + face[2] * width), min(height, y0 + face[3] * height))
    found = random_square((width, height), box, 64, (x, y))
    assert found.size == (64, 64)
    for axis, whole in enumerate((width, height)):
        start, scale = found.offset[axis], found.resized[axis] / whole
        assert 0 <= start <= found.resized[axis] - 64
        low, high = box[axis] * scale, box[axis + 2] * scale
        if high - low <= 62:
            assert start <= low + 1e-6
            assert high <= start + 64 + 1e-6
        else:
            assert start - 1 <= (low + high) / 2 <= start + 65


def test_random_squares_reach_both_ends() -> None:
    offsets = {random_square((300, 100), (140, 40, 160, 60), 100, (draw, draw)).offset for draw in (0, 0.999)}
    assert offsets == {(60, 0), (140, 0)}


def test_only_the_whole_photo_has_an_aspect_of_its_own() -> None:
    sizes = buckets(64)
    assert bucketed("full", (160, 112), (0, 0, 9, 9), sizes).size != (64, 64)
    assert bucketed("half", (96, 97), (0, 0, 9, 9), sizes).size == (64, 64)


READING = Reading(
    features=Features(("segmented",), ({"arcface": "arcface.npy"},), {"arcface.npy": (512,)}, {}),
    mirrored={},
    crops=CROPS,
    latents=False,
    text={},
    flip=0.5,
    colour=0.0,
    alternatives=0.0,
    faces=1,
    notices=(),
)


def planned(
    files: dict[str, bytes] | None = None, count: int = 1, reading: Reading = READING, **config: Any
) -> list[Planned]:
    told = TrainConfig.model_validate({"data": {"resolution": 64}, **config})
    planner = Planner(reading, told, np.random.default_rng(3))
    return [planner(Raw(SHARD, "a-00000-000", dict(files or fake.sample(0)))) for _ in range(count)]


def test_a_planned_sample_holds_the_picked_target_alone() -> None:
    for one in planned(count=9):
        assert {f"{name}.jpg" for name in CROPS} & one.raw.files.keys() == {f"{one.crop}.jpg"}
        assert one.caption == "caption 0"


def test_points_follow_scaling_cut_and_mirror() -> None:
    for one in planned(count=30):
        box, (width, height) = fake.BOXES[one.crop], one.fit.size
        scale = one.fit.resized[0] / (box[2] - box[0]), one.fit.resized[1] / (box[3] - box[1])
        expected = [
            (
                (x + 0.5 - box[0]) * scale[0] - 0.5 - one.fit.offset[0],
                (y + 0.5 - box[1]) * scale[1] - 0.5 - one.fit.offset[1],
            )
            for x, y in fake.KPS
        ]
        if one.mirror:
            expected = [(width - 1 - expected[index][0], expected[index][1]) for index in (1, 0, 2, 4, 3)]
        np.testing.assert_allclose(one.kps, expected, atol=1e-3)
        assert one.kps[0, 0] < one.kps[1, 0], "the left eye stays on the left"
        assert (one.kps >= 0).all()
        assert (one.kps < (width, height)).all()


def test_one_draw_decides_what_is_unconditional() -> None:
    count = 1000
    told = {"p_uncond_image": 0.1, "p_uncond_text": 0.2, "p_uncond_both": 0.3}
    samples = planned(count=count, guidance=told)
    found = Counter((one.uncond_image, one.uncond_text) for one in samples)
    shares = {(True, False): 0.1, (False, True): 0.2, (True, True): 0.3, (False, False): 0.4}
    for which, share in shares.items():
        assert abs(found[which] / count - share) < 0.03, which
    mirrored = sum(one.mirror for one in samples)
    assert abs(mirrored / count - 0.5) < 0.04


def test_kinds_and_captions_are_mixed_by_their_weights() -> None:
    count, data = 1000, {"resolution": 64, "kinds": {"web": 0.25}}
    web, made = fake.sample(0), fake.sample(0, source_kind="made", text_alternatives=["b", "c"])
    mixing = replace(READING, alternatives=0.4)
    assert abs(sum(one is not None for one in planned(web, count, data=data)) / count - 0.25) < 0.03
    found = planned(made, count, mixing, data=data)
    captions = Counter(one.caption for one in found)
    assert captions.total() == count
    for caption, share in {"caption 0": 0.6, "b": 0.2, "c": 0.2}.items():
        assert abs(captions[caption] / count - share) < 0.03, caption
    assert [one.mirror for one in found] == [one.mirror for one in planned(web, count)]


def test_one_setting_does_not_move_the_draws_of_another() -> None:
    plain = planned(count=40, data={"resolution": 64})
    other = planned(
        count=40, data={"resolution": 64, "buckets": False}, guidance={"p_uncond_image": 0.9, "p_uncond_both": 0}
    )
    assert [one.mirror for one in plain] == [one.mirror for one in other]


@pytest.mark.parametrize(
    "changes",
    [
        {"kps": [[0, 0]] * 4},
        {"kps": None},
        {"kps": [[float("nan"), 0]] * 5},
        {"bbox": [1, 2, 3]},
        {"crops": {}},
        {"crops": None},
        {"crops": {name: {"box": [5, 5, 5, 5], "size": [9, 9]} for name in CROPS}},
        {"crops": {name: {"box": [0, 0, 5, 5], "size": [0, 9]} for name in CROPS}},
    ],
)
def test_a_json_that_cannot_be_used_names_shard_and_key(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptShardError, match=r"a-00000\.tar: a-00000-000\.json "):
        planned(fake.sample(0, **changes))


@given(st.binary(max_size=60) | st.sampled_from([b"[]", b"1", b'{"crops": 1}', b"[" * 5000]))
def test_any_json_is_either_used_or_named(data: bytes) -> None:
    with pytest.raises(CorruptShardError, match=r"a-00000-000\.json "):
        planned({**fake.sample(0), "json": data})


def test_a_photo_that_gave_no_crop_is_no_error() -> None:
    assert planned(fake.sample(0, has=())) == [None]


def test_a_crop_that_the_json_knows_must_be_there() -> None:
    files = fake.sample(0)
    del files["half.jpg"]
    with pytest.raises(CorruptShardError, match=r"a-00000-000\.half\.jpg is missing"):
        planned(files)
