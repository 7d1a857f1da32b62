"""Copy-paste, diversity and the scale: what follows from their formulas, whatever the pictures."""

from itertools import chain

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.train.loader.faces import Face, Photo
from pipeline.train.validate.distances import DISTANCES, Viewer, copy_paste, scale, spread

SEEDS = st.integers(0, 10_000)


def unit(draws, size=8):
    vector = draws.normal(size=size)
    return vector / np.linalg.norm(vector)


def view(draws):
    return {"id": unit(draws), "clip": unit(draws), "pose": draws.normal(size=3) * 30, "pixels": draws.random(12)}


@given(SEEDS, st.integers(1, 4))
def test_copy_paste_is_between_the_photo_itself_and_the_only_other_one(seed, count):
    draws = np.random.default_rng(seed)
    image, condition, *others = (view(draws) for _ in range(2 + count))
    scores = copy_paste(image, condition, others)
    assert scores.keys() == DISTANCES.keys()
    assert all(-1 - 1e-9 <= score <= 1 + 1e-9 for score in scores.values())
    assert copy_paste(condition, condition, others) == pytest.approx(dict.fromkeys(DISTANCES, 1), abs=1e-6)
    assert copy_paste(others[0], condition, others[:1]) == pytest.approx(dict.fromkeys(DISTANCES, -1), abs=1e-6)
    one = others[0]
    middle = {space: (condition[space] + one[space]) / 2 for space in ("pose", "pixels")}
    middle |= {space: np.sum([condition[space], one[space]], 0) for space in ("id", "clip")}
    middle |= {space: middle[space] / np.linalg.norm(middle[space]) for space in ("id", "clip")}
    assert copy_paste(middle, condition, [one]) == pytest.approx(dict.fromkeys(DISTANCES, 0), abs=1e-6)


def test_it_is_the_difference_of_angles_over_the_angle_between_the_photos():
    degrees = {name: np.radians(angle) for name, angle in {"condition": 0, "image": 20, "one": 60, "other": 90}.items()}
    at = {name: {"id": np.array([np.cos(angle), np.sin(angle)])} for name, angle in degrees.items()}
    assert copy_paste(at["image"], at["condition"], [at["one"]]) == {"id": pytest.approx((40 - 20) / 60)}
    both = copy_paste(at["image"], at["condition"], [at["one"], at["other"]])
    assert both == {"id": pytest.approx((40 - 20 + 70 - 20) / (60 + 90))}


def test_what_is_not_known_has_no_score():
    draws = np.random.default_rng(0)
    image, condition, other = view(draws), view(draws), view(draws)
    faceless = {"pixels": image["pixels"]}
    assert copy_paste(image, condition, []) == {}
    assert copy_paste(faceless, condition, [other]).keys() == {"pixels"}
    assert copy_paste(image, condition, [condition]) == {}, "the other photo is the same one"
    assert spread([image]) == {}
    assert spread([image, faceless]).keys() == {"pixels"}
    assert scale([[faceless], [image]]) == ([[], []], [[], []])


@given(SEEDS)
def test_spread_and_scale_do_not_depend_on_the_order(seed):
    draws = np.random.default_rng(seed)
    persons = [[view(draws) for _ in range(count)] for count in (3, 1, 2)]
    assert spread(persons[0]) == pytest.approx(spread(persons[0][::-1]))
    same, strangers = scale(persons)
    assert [len(some) for some in same] == [3, 0, 1]
    assert [len(some) for some in strangers] == [2, 2, 2]
    assert sorted(chain(*strangers)) == pytest.approx(sorted(chain(*scale(persons[::-1])[1])))


def test_without_a_judge_pixels_are_seen_from_black_to_white():
    black, white = np.zeros((64, 48, 3), np.uint8), np.full((50, 70, 3), 255, np.uint8)
    viewer = Viewer("", "")
    assert spread([viewer.image(black), viewer.image(white)]) == {"pixels": pytest.approx(1)}
    photo = Photo("x", black, cv2.resize(white, (9, 9)))
    assert [list(view) for view in viewer.photos(Face(photo, {}, [photo]))] == [["pixels"], ["pixels"]]
