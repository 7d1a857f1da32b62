"""The validation grid: what is where, whatever the size of the images and the length of the prompts."""

import numpy as np
import pytest

from pipeline.train.validate.grid import GridRow, draw

LONG = "a person in a spacesuit, highly detailed, standing on the surface of the moon with the Earth rising behind"


def flat(side, value):
    """An image of one colour, which the ink and its edges do not have."""
    return np.broadcast_to(np.array([value, 0, 250], np.uint8), (side, side, 3))


def ink(part):
    return (part.max(-1) == part.min(-1)) & (part[..., 0] < 100)


def rows(side, captions="", name="shard-00000"):
    """Two faces of the colours 10 and 11, and three images of each: 100, 101, 102; 110, 111, 112."""
    images = [[flat(side, 100 + 10 * row + column) for column in range(3)] for row in range(2)]
    return [GridRow(name, flat(224, 10 + row), images[row], [captions] * 3) for row in range(2)]


def box(sheet, value):
    """Box (x0, y0, x1, y1) of the image of one colour."""
    there = (sheet[..., 0] == value) & (sheet[..., 1] == 0) & (sheet[..., 2] == 250)
    (top, bottom), (left, right) = ((at[0], at[-1] + 1) for at in (np.flatnonzero(there.any(axis)) for axis in (1, 0)))
    assert there.sum() == (bottom - top) * (right - left), "something is drawn over the image"
    return left, top, right, bottom


@pytest.mark.parametrize(("side", "drawn"), [(64, 192), (100, 200), (192, 192), (512, 512)])
def test_images_stand_in_rows_and_columns_at_whole_multiples_of_their_size(side, drawn):
    sheet = draw(["a", "b", "c"], rows(side))
    values = [[10 + row, *range(100 + 10 * row, 103 + 10 * row)] for row in range(2)]
    cells = np.array([[box(sheet, value) for value in line] for line in values])
    assert (cells[..., 2:] - cells[..., :2] == drawn).all()
    assert (cells[:, :-1, 2] < cells[:, 1:, 0]).all(), "columns overlap"
    assert (cells[0, :, 3] < cells[1, :, 1]).all(), "rows overlap"
    assert (cells[0, :, 0] == cells[1, :, 0]).all()
    assert (cells[:, :1, 1] == cells[:, :, 1]).all()


def test_pixels_are_enlarged_and_not_blurred():
    image = np.random.default_rng(0).integers(0, 200, (64, 64, 3), dtype=np.uint8)
    sheet = draw(["a"], [GridRow("x", flat(224, 255), [image], [""])])
    _, top, right, _ = box(sheet, 255)
    left = right + 8
    assert np.array_equal(sheet[top : top + 192 : 3, left : left + 192 : 3], image)


@pytest.mark.parametrize("prompt", [LONG, "x" * 90, "", "Ágjpqy|", "a\nportrait\tof", LONG * 4, "W" * 90])
def test_prompts_stay_above_their_images_and_within_their_columns(prompt):
    sheet = draw(["", prompt, ""], rows(64))
    left, top, right, _ = box(sheet, 101)
    assert not ink(sheet[:, right : right + 8]).any(), "text runs out of its column"
    assert (sheet[0] == 255).all(), "text is cut at the top"
    assert (sheet[top - 1] == 255).all(), "text touches the images"
    assert ink(sheet[:top, left:right]).any() == bool(prompt.strip())


@pytest.mark.parametrize("name", ["shard-00000", "laion-part-000000-" * 6 + "1234"])
def test_names_and_captions_are_below_their_images_and_do_not_touch_the_next(name):
    sheet, plain = draw(["a", "b", "c"], rows(64, "ID 0.43", name)), draw(["a", "b", "c"], rows(64, name=""))
    changed = (sheet != plain).any(-1)
    for value in (10, 11, 100, 101, 102, 110, 111, 112):
        left, _, right, bottom = box(sheet, value)
        assert changed[bottom : bottom + 24, left:right].any(), "no text"
        assert not ink(sheet[bottom:, right : right + 8]).any(), "text runs out of its column"
    assert not ink(sheet[-2:]).any(), "text is cut at the bottom"


def test_of_a_long_name_the_end_is_seen():
    first, second = (draw(["a"] * 3, rows(64, name="laion-part-" * 9 + end)) for end in ("1", "2"))
    assert not np.array_equal(first, second)


def test_a_face_of_another_shape_is_fitted_whole():
    sheet = draw(["a"], [GridRow("x", flat(100, 10)[:50], [flat(64, 100)], [""])])
    left, top, right, bottom = box(sheet, 10)
    assert (right - left, bottom - top) == (192, 96)
