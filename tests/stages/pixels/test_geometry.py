import warnings

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from skimage import data as samples

from schemas import arcface
from stages.pixels import geometry
from stages.pixels.geometry import FFHQ_TEMPLATE, Box, crop_box

ARCFACE_TEMPLATE = np.array(arcface.ARCFACE_TEMPLATE, np.float32)
KPS = np.array([[204.4, 100.8], [247.3, 103.1], [223.5, 128.4], [201.2, 138.5], [246.4, 140.6]], np.float32)
"""The astronaut's face, as SCRFD sees it."""


def similar(scale: float, degrees: float, x: float, y: float) -> np.ndarray:
    turn = np.radians(degrees)
    rotation = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return np.hstack([rotation, [[x], [y]]])


matrices = st.builds(similar, st.floats(0.3, 12), st.floats(-180, 180), st.floats(-100, 2000), st.floats(-100, 2000))
jitters = st.lists(st.floats(-4, 4), min_size=10, max_size=10).map(lambda values: np.reshape(values, (5, 2)))


def test_similarity_never_mirrors() -> None:
    mirrored = ARCFACE_TEMPLATE * np.array([-1, 1], np.float32)
    assert np.linalg.det(geometry.similarity(mirrored, ARCFACE_TEMPLATE)[:, :2]) > 0


@pytest.mark.parametrize("kps", [np.zeros((5, 2)), np.full((5, 2), 7.0), np.full((5, 2), np.nan), KPS * [np.inf, 1]])
def test_similarity_refuses_points_that_determine_none(kps: np.ndarray) -> None:
    with pytest.raises(ValueError, match="points"):
        geometry.similarity(kps, ARCFACE_TEMPLATE)


@given(matrices, jitters, st.sampled_from([112, 224]))
@settings(max_examples=12, deadline=None)
def test_norm_crop_is_insightface_s(matrix: np.ndarray, jitter: np.ndarray, size: int) -> None:
    from insightface.utils import face_align

    image = samples.astronaut()
    kps = geometry.transform_points(matrix, ARCFACE_TEMPLATE + jitter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = face_align.norm_crop(image, kps, size)
    ours = geometry.norm_crop(image, kps.tolist(), size)
    assert (ours == theirs).all()


def test_ffhq_crop_is_filled_with_grey_outside_of_the_photo() -> None:
    tight = samples.astronaut()[60:170, 190:260]
    crop = geometry.ffhq_crop(tight, KPS - [190, 60])
    assert crop.shape == (512, 512, 3)
    assert crop[0, 0].tolist() == [132, 133, 135]
    assert np.abs(geometry.transform_points(geometry.ffhq_matrix(KPS), KPS) - FFHQ_TEMPLATE).max() < 15


@pytest.mark.parametrize("seed", range(10))
def test_a_crop_is_the_same_of_a_part_of_the_photo(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, image = np.random.default_rng(seed), samples.astronaut()
    matrix = similar(rng.uniform(0.3, 1.5), rng.uniform(-180, 180), rng.uniform(-50, 500), rng.uniform(-50, 500))
    kps = geometry.transform_points(matrix, ARCFACE_TEMPLATE)
    whole = geometry.ffhq_crop(image, kps)
    monkeypatch.setattr(geometry, "MOST_SIDE", 511)
    assert (geometry.ffhq_crop(image, kps) == whole).all()


@pytest.mark.parametrize("scale", [1, 300])
def test_a_photo_may_be_wider_than_opencv_warps(scale: int) -> None:
    kps = (KPS - KPS[0]) * [scale, 1] + [20_000, 300]
    photo = np.full((600, geometry.MOST_SIDE + 1, 3), 200, np.uint8)
    photo[:, :20_000] = 100
    crop = geometry.norm_crop(photo, kps, 224)
    eye = geometry.transform_points(geometry.norm_matrix(kps, 224), kps[:1])[0].round().astype(int)
    assert crop[eye[1], eye[0] - 8].tolist() == [100] * 3
    assert crop[eye[1], eye[0] + 8].tolist() == [200] * 3


@given(matrices, jitters, st.floats(0.1, 0.9), st.floats(0.1, 0.9))
@settings(deadline=None)
def test_a_label_lands_where_its_pixel_lands(matrix: np.ndarray, jitter: np.ndarray, u: float, v: float) -> None:
    kps = geometry.transform_points(matrix, ARCFACE_TEMPLATE + jitter)
    in_face = np.array([u, v]) * 223
    in_photo = geometry.transform_points(geometry.invert(geometry.norm_matrix(kps, 224)), [in_face])
    (column, row) = geometry.transform_points(geometry.ffhq_matrix(kps), in_photo)[0]
    assume(8 <= column <= 503 and 8 <= row <= 503)
    labels = np.zeros((512, 512), np.uint8)
    labels[round(row) - 6 : round(row) + 7, round(column) - 6 : round(column) + 7] = 7
    warped = geometry.warp_labels(labels, kps, 224)
    assert warped[round(in_face[1]), round(in_face[0])] == 7
    assert set(np.unique(warped)) <= {0, 7}
    rows, columns = np.nonzero(warped)
    assert np.abs([columns.mean() - in_face[0], rows.mean() - in_face[1]]).max() < 1.5


def test_labels_outside_of_the_ffhq_crop_are_background() -> None:
    # the norm_crop lies well within the FFHQ crop for any real face: these points are those of none
    kps = np.add(KPS, [[0, 0], [0, 0], [0, 0], [0, -60], [0, -60]])
    grid = np.stack(np.meshgrid(np.arange(224), np.arange(224)), axis=-1).reshape(-1, 2)
    to_photo = np.vstack([geometry.invert(geometry.norm_matrix(kps, 224)), [0, 0, 1]])
    matrix = geometry.ffhq_matrix(kps) @ to_photo
    moved = geometry.transform_points(matrix, grid)
    beyond = np.maximum(-moved, moved - 511).max(axis=1).reshape(224, 224)
    warped = geometry.warp_labels(np.full((512, 512), 9, np.uint8), kps, 224)
    assert (warped[beyond > 1] == 0).all()
    assert (warped[beyond < -1] == 9).all()
    assert 100 < (beyond > 1).sum() < 40_000


def test_pixels_beyond_the_photo_are_known() -> None:
    photo = np.full((110, 70, 3), 255, np.uint8)
    kps = KPS - [190, 60]
    inside = geometry.inside_photo(kps, 70, 110, 224)
    white = geometry.norm_crop(photo, kps, 224)[..., 0] == 255
    assert 0.3 < inside.mean() < 0.99
    assert (inside == white).mean() > 0.99
    assert not (inside & ~white)[2:-2, 2:-2].any()


def test_foreground_keeps_the_labels_asked_for() -> None:
    face = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    mask = np.array([[0, 1, 16], [17, 0, 1]], np.uint8)
    shown = geometry.foreground(face, mask, (1, 17), (128, 7, 9))
    assert shown.dtype == np.uint8
    assert shown[0, 1].tolist() == face[0, 1].tolist()
    assert shown[1, 0].tolist() == face[1, 0].tolist()
    assert shown[0, 0].tolist() == shown[0, 2].tolist() == [128, 7, 9]


@pytest.mark.parametrize(("right_eye", "degrees"), [((10, 0), 0), ((10, 10), 45), ((0, 10), 90), ((10, -10), -45)])
def test_roll_is_clockwise(right_eye: tuple[int, int], degrees: float) -> None:
    assert arcface.pose(np.array([[[0, 0], right_eye, [5, 5], [0, 9], [9, 9]]], float))[2] == pytest.approx(degrees)


@st.composite
def faces(draw: st.DrawFn) -> tuple[tuple[float, float, float, float], int, int]:
    """A face box, partly in a photo, with that photo's size."""
    width, height = draw(st.integers(200, 4000)), draw(st.integers(200, 4000))
    tall = draw(st.floats(20, 3000))
    broad = tall * draw(st.floats(0.5, 1.4))
    x, y = draw(st.floats(-broad * 0.6, width - broad * 0.4)), draw(st.floats(-tall * 0.6, height - tall * 0.4))
    return (x, y, x + broad, y + tall), width, height


framings = st.tuples(st.floats(0.05, 1), st.floats(0, 0.5), st.floats(0, 1), st.integers(1, 1024))


@given(faces(), framings)
@settings(max_examples=75)
def test_crop_boxes_keep_every_promise(
    face: tuple[tuple[float, ...], int, int], framing: tuple[float, float, float, int]
) -> None:
    (bbox, width, height), (wanted, tolerance, _, min_side) = face, framing
    box = crop_box(bbox, width, height, *framing)
    if isinstance(box, str):
        return
    side = box.x1 - box.x0
    assert box.y1 - box.y0 == side >= min_side
    assert 0 <= box.x0 < box.x1 <= width
    assert 0 <= box.y0 < box.y1 <= height
    share = (bbox[3] - bbox[1]) / side
    assert share <= wanted * (1 + tolerance) + 1e-9
    if side < min(width, height):
        assert (bbox[3] - bbox[1]) / (side - 1) > wanted
    assert box.x0 <= max(bbox[0], 0)
    assert box.x1 >= min(bbox[2], width)
    assert box.y0 <= max(bbox[1], 0)
    assert box.y1 >= min(bbox[3], height)
    assert all(type(edge) is int for edge in box)


@given(st.integers(100, 400), st.floats(0.2, 0.9), st.floats(0.2, 0.8))
@example(117, 0.8999999999999999, 0.5)
def test_a_crop_is_found_wherever_there_is_room(tall: int, share: float, centre: float) -> None:
    bbox = (5000 - tall / 2, 5000 - tall / 2, 5000 + tall / 2, 5000 + tall / 2)
    box = crop_box(bbox, 10000, 10000, share, 0, centre, 1)
    assert isinstance(box, Box)
    assert abs((box.x0 + box.x1) / 2 - 5000) <= 1
    side = box.x1 - box.x0
    if side * min(centre, 1 - centre) > tall / 2 + 1:
        assert abs(box.y0 + side * centre - 5000) <= 1


@pytest.mark.parametrize(
    ("bbox", "size", "answer"),
    [
        ((900, 900, 1100, 1156), (2000, 2000), Box(744, 798, 1256, 1310)),
        ((900, 900, 1100, 1155), (2000, 2000), "the crop would be too small: 510 px, the least is 512"),
        ((0, 0, 200, 256), (2000, 2000), Box(0, 0, 512, 512)),
        ((1800, 1800, 2000, 2056), (2000, 2000), Box(1488, 1488, 2000, 2000)),
        ((300, 200, 700, 760), (1024, 2000), Box(0, 19, 1024, 1043)),
        ((300, 200, 700, 764), (1024, 2000), "the photo is too small: a square of 1128 px is wanted, 1024 px is there"),
        ((300, 300, 300, 300), (2000, 2000), "the crop would be too small: 1 px, the least is 512"),
    ],
)
def test_crop_boxes_by_hand(bbox: tuple[float, ...], size: tuple[int, int], answer: Box | str) -> None:
    assert crop_box(bbox, *size, share=0.5, tolerance=0.1, centre=0.45, min_side=512) == answer


def test_a_face_broader_than_the_square_has_no_crop() -> None:
    answer = crop_box((100, 100, 500, 300), 1000, 1000, 1, 0, 0.5, 1)
    assert answer == "the face does not fit into a square of 200 px"
