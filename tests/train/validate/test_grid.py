"""The validation grid: what is where, whatever the size of the images and the length of the prompts."""

import numpy as np
import pytest

from pipeline.train.validate.grid import Row, draw

WHITE = 255


def flat(side, value):
    """An image of one colour, which the ink and its edges do not have."""
    return np.broadcast_to(np.array([value, 0, 250], np.uint8), (side, side, 3))


def ink(part):
    return (part.max(-1) == part.min(-1)) & (part[..., 0] < 100)


def rows(side, count=2, columns=3, captions=""):
    return [
        Row(f"shard-{row:05d}", flat(224, 10 + row), [flat(side, 100 + 10 * row + c) for c in range(columns)],
            [captions] * columns)
        for row in range(count)
    ]  # fmt: skip


def boxes(sheet, value):
    """Box (x0, y0, x1, y1) of the image of one colour."""
    there = np.argwhere((sheet == (value, 0, 250)).all(-1))
    (top, left), (bottom, right) = there.min(0), there.max(0) + 1
    assert len(there) == (bottom - top) * (right - left), "something is drawn over the image"
    return left, top, right, bottom


@pytest.mark.parametrize(("side", "drawn"), [(64, 192), (100, 200), (192, 192), (512, 512)])
def test_images_stand_in_rows_and_columns_at_whole_multiples_of_their_size(side, drawn):
    sheet = draw(["a", "b", "c"], rows(side))
    cells = {(row, column): boxes(sheet, 100 + 10 * row + column) for row in range(2) for column in range(3)}
    assert all((right - left, bottom - top) == (drawn, drawn) for left, top, right, bottom in cells.values())
    assert len({cells[row, 1][0] for row in range(2)}) == 1
    assert len({cells[1, column][1] for column in range(3)}) == 1
    assert cells[0, 0][2] < cells[0, 1][0] < cells[0, 2][0]
    assert cells[0, 0][3] < cells[1, 0][1]
    for row in range(2):
        left, top, right, bottom = boxes(sheet, 10 + row)
        assert right < cells[row, 0][0]
        assert (top, bottom) == (cells[row, 0][1], cells[row, 0][3])
        assert right - left == drawn


def test_pixels_are_enlarged_and_not_blurred():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 200, (64, 64, 3), dtype=np.uint8)
    sheet = draw(["a"], [Row("x", flat(224, 255), [image], [""])])
    left, top, right, _ = boxes(sheet, 255)
    left = right + left
    assert np.array_equal(sheet[top : top + 192 : 3, left : left + 192 : 3], image)


LONG = "a person in a spacesuit, highly detailed, standing on the surface of the moon with the Earth rising behind"


@pytest.mark.parametrize("prompt", [LONG, "x" * 90, "", "Ágjpqy|", "a\nportrait\tof", LONG * 4])
def test_prompts_stay_above_their_images_and_within_their_columns(prompt):
    sheet = draw(["", prompt, ""], rows(64))
    left, top, right, _ = boxes(sheet, 101)
    assert not ink(sheet[:, right : right + 8]).any(), "text runs out of its column"
    assert (sheet[0] == WHITE).all(), "text is cut at the top"
    assert (sheet[top - 1] == WHITE).all(), "text touches the images"
    header = sheet[:top, left:right]
    assert ink(header).any() == bool(prompt.strip())


def test_a_longer_prompt_makes_room_for_itself():
    short, long = draw(["a"], rows(64, columns=1)), draw([LONG], rows(64, columns=1))
    assert long.shape[0] > short.shape[0]
    assert long.shape[1] == short.shape[1]


def test_names_and_captions_are_below_their_images_and_do_not_touch_the_next():
    sheet = draw(["a", "b", "c"], rows(64, captions="ID 0.43"))
    plain = draw(["a", "b", "c"], rows(64))
    changed = np.argwhere((sheet != plain).any(-1))
    for row in range(2):
        for column in range(3):
            left, _, right, bottom = boxes(sheet, 100 + 10 * row + column)
            below = changed[(changed[:, 0] >= bottom) & (changed[:, 1] >= left) & (changed[:, 1] < right)]
            assert len(below), "no caption"
    assert not ink(sheet[-2:]).any(), "text is cut at the bottom"
    left, _, right, bottom = boxes(sheet, 10)
    assert ink(sheet[bottom : bottom + 24, left:right]).any(), "no name"


def test_a_name_that_is_too_long_keeps_its_end():
    long, short = "laion-part-000000-" * 6 + "1234", "…x"
    sheet = draw(["a"], [Row(long, flat(224, 10), [flat(64, 100)], [""])])
    _, _, right, bottom = boxes(sheet, 10)
    assert not ink(sheet[bottom:, right : right + 8]).any()
    assert not np.array_equal(sheet, draw(["a"], [Row(short, flat(224, 10), [flat(64, 100)], [""])]))


def test_a_face_of_another_shape_is_fitted_whole():
    wide = flat(100, 10)[:50]
    sheet = draw(["a"], [Row("x", wide, [flat(64, 100)], [""])])
    left, top, right, bottom = boxes(sheet, 10)
    assert (right - left, bottom - top) == (192, 96)
