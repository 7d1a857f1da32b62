import base64
import json

import fake_dataset as fake
import numpy as np
import pytest

from pipeline.dataset.finished.report_cards import LABEL_COLOURS, Card, marked, masked
from pipeline.shared.page import data_uri
from pipeline.shared.tars import Sample
from schemas.shard import sample_files
from stages.models.segmenters.facexlib import BISENET_LABELS
from stages.pixels.images import decode_jpeg, encode_jpeg

GREY = np.full((600, 800, 3), 128, np.uint8)
KPS = [[300, 200], [400, 200], [350, 260], [310, 320], [390, 320]]


def touched(jpeg):
    """Rows and columns of the pixels that are not grey: y0 x0 y1 x1."""
    far = np.abs(decode_jpeg(jpeg).astype(int) - 128).max(axis=2) > 70
    places = np.argwhere(far)
    return [*places.min(axis=0), *places.max(axis=0)]


def test_labels_are_those_of_the_parser():
    assert tuple(LABEL_COLOURS) == BISENET_LABELS
    assert len(set(LABEL_COLOURS.values())) == 19


def test_the_box_lies_where_the_face_is():
    drawn = touched(marked(GREY, 400, (0, 0, 800, 600), (200, 100, 500, 400), None))
    assert np.abs(np.subtract(drawn, (50, 100, 200, 250))).max() <= 3


def test_a_crop_shows_the_box_in_its_own_frame():
    drawn = touched(marked(GREY[:, :600], 300, (100, 50, 1300, 1250), (400, 650, 700, 1000), None))
    assert np.abs(np.subtract(drawn, (150, 75, 237, 150))).max() <= 3


def test_points_lie_where_they_are_and_left_is_red():
    picture = decode_jpeg(marked(GREY, 800, (0, 0, 800, 600), None, KPS))
    red, blue = picture[200, 300].astype(int), picture[200, 400].astype(int)
    assert red[0] - red[2] > 100
    assert blue[2] - blue[0] > 100


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30, 1e30])
def test_boxes_and_points_from_nowhere_draw_nothing_and_raise_nothing(value):
    picture = decode_jpeg(marked(GREY, 400, (0, 0, 800, 600), [value] * 4, [[value, value]] * 5))
    assert np.abs(picture.astype(int) - 128).max() < 5


def test_the_photo_itself_is_never_drawn_upon():
    image = np.full((50, 60, 3), 128, np.uint8)
    image.flags.writeable = False
    marked(image, 100, (0, 0, 60, 50), (10, 10, 20, 20), KPS)


def test_every_label_has_its_colour_and_unknown_ones_do_not_fail():
    face, mask = np.full((224, 224, 3), 128, np.uint8), np.zeros((224, 224), np.uint8)
    mask[:, :112], mask[:, 112:] = 1, 17
    picture = decode_jpeg(masked(face, mask, 224)).astype(int)
    for x, name in ((50, "skin"), (170, "hair")):
        wanted = 0.45 * 128 + 0.55 * np.array(LABEL_COLOURS[name])
        assert np.abs(picture[100, x] - wanted).max() < 8
    mask[:] = 255
    assert decode_jpeg(masked(face, mask, 224)).shape == (224, 224, 3)


def test_a_data_uri_gives_the_bytes_back():
    assert base64.b64decode(data_uri(b"\xff\xd8x").removeprefix("data:image/jpeg;base64,")) == b"\xff\xd8x"


def card_of(record):
    return Card.of_sample(Sample(record["key"], sample_files(record)), json.loads(record["json"]))


def test_a_card_of_a_sample_shows_what_there_is_and_why_the_rest_is_absent():
    card = card_of(fake.record("a", 0, text="x" * 301))
    titles = [picture.title for picture in card.pictures]
    assert titles == ["photo", "face", "mask", "portrait 300\N{NO-BREAK SPACE}px", "half"]
    assert [bool(picture.uri) for picture in card.pictures] == [True, True, True, True, False]
    assert card.pictures[-1].absent == "the photo is too small"
    assert card.text == "x" * 300 + "…"
    assert card.labels == frozenset(range(19))
    small = {"full": {"absent": "too small"}}
    changes = {"full": None, "crops": json.dumps({**fake.CROPS, **small})}
    photo = card_of(fake.record("a", 0, **changes)).pictures[0]
    assert photo.title == "portrait (no full: too small)"
    changes |= {"portrait": None, "crops": json.dumps({**fake.CROPS, **small, "portrait": {"absent": "blurred"}})}
    card = card_of(fake.record("a", 0, **changes))
    assert [picture.absent for picture in card.pictures] == ["too small", "", "", "blurred", "the photo is too small"]


@pytest.mark.parametrize("measured", [{}, {"width": 400, "height": 300, "bbox": [0, 0, 9, 9], "n_faces": 1}])
def test_a_card_of_a_drop_shows_what_was_measured(measured):
    unknown = dict.fromkeys(("url", "width", "height", "bbox", "kps"))
    record = {"key": "a-000000001", **unknown, **measured}
    card = Card.of_drop(record, encode_jpeg(GREY, 80))
    assert len(card.pictures) == 1
    assert card.length == len(card.pictures[0].uri) > 0
    assert card.facts == (["400 × 300", "faces 1"] if measured else [])
    assert Card.of_drop(record, None).pictures == []
    assert Card.of_drop(record, b"junk").pictures == [], "thumbnails are disposable"
