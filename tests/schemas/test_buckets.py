"""Buckets and cuts: what every resolution and every picture must give."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from schemas.buckets import buckets, fit, fit_around, nearest

RESOLUTIONS = st.integers(1, 192).map(lambda n: 8 * n)
SIDES = st.integers(8, 4096)


@given(RESOLUTIONS, st.floats(1.0, 4.0))
def test_buckets_keep_their_promises(resolution: int, max_aspect: float) -> None:
    sizes = buckets(resolution, max_aspect=max_aspect)
    step = 64 if resolution >= 512 else 8
    aspects = [width / height for width, height in sizes]
    assert (resolution, resolution) in sizes
    assert aspects == sorted(set(aspects))
    assert all(1 / max_aspect <= aspect <= max_aspect for aspect in aspects)
    assert {(height, width) for width, height in sizes} == set(sizes)
    for width, height in set(sizes) - {(resolution, resolution)}:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert min(width, height) * (max(width, height) + step) > resolution**2, "a longer one would still fit"


def test_the_well_known_sizes_come_out() -> None:
    assert buckets(512) == ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))
    assert {(768, 1344), (832, 1216), (896, 1152), (960, 1088)} <= set(buckets(1024))
    assert buckets(64) == ((48, 80), (56, 72), (64, 64), (72, 56), (80, 48))
    assert buckets(512, max_aspect=1.0) == ((512, 512),)


@pytest.mark.parametrize("resolution", [0, -8, 4, 500, 1023])
def test_a_resolution_that_has_no_latents_is_refused(resolution: int) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        buckets(resolution)


@given(SIDES, SIDES, RESOLUTIONS)
def test_nearest_is_the_nearest_by_ratio_and_does_not_depend_on_scale(width: int, height: int, resolution: int) -> None:
    sizes = buckets(resolution)
    chosen = nearest(width, height, sizes)
    distances = [abs(math.log(width * h / height / w)) for w, h in sizes]
    assert math.isclose(distances[sizes.index(chosen)], min(distances), abs_tol=1e-12)
    assert nearest(1000, 1000, sizes) == (resolution, resolution)


@given(SIDES, SIDES, SIDES, SIDES, st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_fit_covers_its_size_with_nothing_to_spare(
    width: int, height: int, w: int, h: int, at: tuple[float, float]
) -> None:
    resized, offset, size = fit(width, height, (w, h), at)
    assert size == (w, h)
    assert resized[0] >= w
    assert resized[1] >= h
    assert resized[0] == w or resized[1] == h
    assert all(0 <= start <= whole - cut for start, whole, cut in zip(offset, resized, size, strict=True))
    scale = max(w / width, h / height)
    assert all(abs(new - old * scale) <= 1 for new, old in zip(resized, (width, height), strict=True))


def test_at_names_the_ends_and_the_middle() -> None:
    assert fit(200, 100, (50, 50), (0, 0)) == ((100, 50), (0, 0), (50, 50))
    assert fit(200, 100, (50, 50), (1, 1)).offset == (50, 0)
    assert fit(200, 100, (50, 50)).offset == (25, 0)
    assert fit(50, 50, (50, 50)) == ((50, 50), (0, 0), (50, 50))


@given(st.data(), SIDES, SIDES, SIDES, SIDES)
def test_a_box_that_fits_is_held_and_the_middle_is_left_only_for_it(
    data: st.DataObject, width: int, height: int, w: int, h: int
) -> None:
    x0, x1 = sorted(data.draw(st.tuples(*[st.floats(0, width)] * 2)))
    y0, y1 = sorted(data.draw(st.tuples(*[st.floats(0, height)] * 2)))
    (wide, high), offset, _ = fit_around(width, height, (w, h), (x0, y0, x1, y1))
    middle = fit(width, height, (w, h)).offset
    for low, far, start, cut, mid in (
        (x0 * wide / width, x1 * wide / width, offset[0], w, middle[0]),
        (y0 * high / height, y1 * high / height, offset[1], h, middle[1]),
    ):
        assume(far - low <= cut - 2)  # a whole pixel of room on either side
        assert start <= low + 1e-6
        assert far <= start + cut + 1e-6
        if mid + 1 <= low and far <= mid + cut - 1:
            assert abs(start - mid) <= 1


def test_a_box_larger_than_the_cut_is_held_by_its_centre() -> None:
    assert fit_around(100, 400, (100, 100), (0, 150, 100, 350)).offset == (0, 200)
    assert fit_around(100, 400, (100, 100), (0, -50, 100, 100)).offset == (0, 0)


@given(st.integers(1, 16).map(lambda n: 64 * n), st.integers(0, 2000), st.integers(0, 4000))
def test_a_picture_whose_short_side_is_the_resolution_is_never_enlarged(resolution: int, more: int, long: int) -> None:
    width = resolution + more
    height = width + long
    for picture in ((width, height), (height, width)):
        resized = fit(*picture, nearest(*picture, buckets(resolution))).resized
        assert resized[0] <= picture[0]
        assert resized[1] <= picture[1]
