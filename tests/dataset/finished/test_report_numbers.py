"""What the report derives of five points, and how it names what it counts."""

import fake_dataset
import numpy as np
import pytest

from pipeline.dataset.finished.report_cards import Card
from pipeline.dataset.finished.report_numbers import MEASURES, charts
from schemas.arcface import ARCFACE_TEMPLATE, pose

FRONT = np.array(ARCFACE_TEMPLATE)


def turned(degrees):
    at = np.radians(degrees)
    return FRONT @ np.array([[np.cos(at), np.sin(at)], [-np.sin(at), np.cos(at)]])


def nodding(x, y):
    return FRONT + np.array([[0, 0], [0, 0], [x, y], [0, 0], [0, 0]])


def test_a_face_from_the_front_has_no_pose_whatever_its_size_and_position():
    np.testing.assert_allclose(pose(np.array([FRONT, 9 * FRONT + 50])), np.zeros((3, 2)), atol=0.5)


@pytest.mark.parametrize("degrees", [-80, -20, 15, 60])
def test_a_face_turned_in_its_plane_has_roll_alone(degrees):
    yaw, pitch, roll = np.array(pose(turned(degrees)[None]))[:, 0]
    assert roll == pytest.approx(degrees, abs=0.5)
    assert [yaw, pitch] == pytest.approx([0, 0], abs=0.5)


def test_the_nose_shows_where_a_face_turns_to():
    yaw, pitch, _ = pose(np.array([nodding(10, 0), nodding(-10, 0), nodding(0, 8), nodding(0, -8)]))
    assert yaw[0] > 15 > -15 > yaw[1]
    assert pitch[2] > 15 > -15 > pitch[3]


def test_points_that_coincide_have_no_pose():
    assert np.isnan(pose(np.zeros((1, 5, 2)))).all()


def test_charts_are_of_what_was_measured_and_say_it_in_words():
    sums = {measure.name: np.zeros((2, len(measure.edges) - 1), np.int64) for measure in MEASURES}
    sums["det_score"][:, 30] = [3, 1]
    sums["det_score"][0, 31] = 1
    (chart,) = charts(sums)
    assert chart["about"] == "median 0.76 of 4 kept, 0.76 of 1 dropped"
    assert chart["bars"][30] == (1.0, 1.0, "0.75 to 0.78: 3 kept, 1 dropped")
    assert chart["bars"][31][0] == pytest.approx(1 / 3)
    sums["occlusion"][0, 0] = 2
    sums["ai_mark"][:, 0] = [9, 4]
    sums["ai_mark"][0, 1] = 3
    about = [one["about"] for one in charts(sums)]
    assert about[1:] == ["yes: 3 of 12 kept, 0 of 4 dropped", "median under 0.03 of 2 kept"], "of none, nothing is said"


def test_a_file_that_is_no_jpeg_is_not_called_one_of_full_quality():
    record = fake_dataset.record("a", 0)
    cards = [Card.of_drop({**record, "jpeg_quality": quality}, None) for quality in (99, 100)]
    assert ["JPEG" in " ".join(card.facts) for card in cards] == [True, False]
