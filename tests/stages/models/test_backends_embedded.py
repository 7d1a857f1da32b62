"""The weight-free backends: what they promise on the two public-domain photos, and that numbers never waver."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib import cbook
from PIL import Image
from skimage import data

from schemas.errors import WeightsError
from stages.models.backends import backend
from stages.models.detectors import haar as haar_module
from stages.pixels.geometry import ffhq_crop, ffhq_matrix, norm_crop, transform_points
from stages.settings import ModelSettings

SETTINGS = ModelSettings()
ASTRONAUT = np.ascontiguousarray(data.astronaut())
with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as _photo:
    HOPPER = np.array(_photo.convert("RGB"))
PHOTOS = {"astronaut": ASTRONAUT, "hopper": HOPPER}
# Boxes and points that SCRFD-2.5G (insightface, det_size 640) gives for these photos, rounded to pixels.
TRUTH = {
    "astronaut": ([181, 56, 271, 178], [[204, 101], [247, 103], [224, 128], [201, 139], [246, 141]]),
    "hopper": ([179, 124, 350, 333], [[223, 194], [306, 191], [267, 239], [236, 279], [301, 276]]),
}


@pytest.fixture(scope="module")
def haar() -> haar_module.Haar:
    return haar_module.Haar(SETTINGS, "cpu")


@pytest.fixture(scope="module")
def lbp():  # type: ignore[no-untyped-def]
    return backend("face_embedder", "lbp")(SETTINGS, "cpu")


@pytest.fixture(scope="module")
def patches():  # type: ignore[no-untyped-def]
    return backend("image_embedder", "patches")(SETTINGS, "cpu")


@pytest.fixture(scope="module")
def grabcut():  # type: ignore[no-untyped-def]
    return backend("segmenter", "grabcut")(SETTINGS, "cpu")


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("task", "name"),
    [("detector", "haar"), ("segmenter", "grabcut"), ("face_embedder", "lbp"), ("image_embedder", "patches")],
)
def test_cards_need_nothing_loaded(task: str, name: str) -> None:
    cards = backend(task, name).cards(SETTINGS)
    assert {card.task for card in cards} == {task}
    assert all(card.commercial and card.licence for card in cards)
    assert all((len(card.sha256) == 64) == (task == "detector") for card in cards)


def test_an_opencv_without_cascades_is_a_users_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cv2, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(WeightsError, match="opencv-python<5"):
        haar_module.Haar.cards(SETTINGS)


# haar


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("factor", [0.7, 1, pytest.param(3, marks=pytest.mark.long)])
def test_haar_finds_the_face_where_scrfd_does(haar: haar_module.Haar, name: str, factor: float) -> None:
    image = cv2.resize(PHOTOS[name], None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    faces = haar.detect(image)
    bbox, kps = (np.array(value) * factor for value in TRUTH[name])
    assert (faces.score >= 0.5).sum() == 1
    assert iou(faces.bbox[0], bbox) > 0.6  # 0.67 to 0.81: two detectors draw a box differently
    eye_distance = np.linalg.norm(kps[1] - kps[0])
    assert np.linalg.norm(faces.kps[0] - kps, axis=1).mean() < 0.15 * eye_distance  # 0.04 to 0.09


def iou(a: np.ndarray, b: np.ndarray) -> float:
    shared = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return float(shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared))


def test_haar_is_typed_sorted_inside_the_photo_and_repeatable(haar: haar_module.Haar) -> None:
    image = np.hstack([ASTRONAUT, HOPPER[:512], ASTRONAUT[:, ::-1]])
    first, again = haar.detect(image), haar_module.Haar(SETTINGS, "cpu").detect(image)
    assert [(part.dtype, part.shape[1:]) for part in first] == [
        (np.float32, (4,)), (np.float32, (5, 2)), (np.float32, ()),
    ]  # fmt: skip
    assert (first.score >= 0.5).sum() == 3
    assert (np.diff(first.score) <= 0).all()
    assert (first.bbox >= 0).all()
    assert (first.bbox <= [image.shape[1], image.shape[0]] * 2).all()
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_haar_boxes_end_where_the_photo_does(haar: haar_module.Haar) -> None:
    left, top, right, bottom = haar.detect(ASTRONAUT).bbox[0].astype(int)
    tight = np.ascontiguousarray(ASTRONAUT[top + 8 : bottom - 8, left - 30 : right + 30])
    faces = haar.detect(cv2.resize(tight, None, fx=4, fy=4))
    assert faces.score[0] >= 0.5
    assert (faces.bbox[0][1], faces.bbox[0][3]) == (0, 4 * tight.shape[0])


@pytest.mark.parametrize("shape", [(1, 1), (10, 2000), (3000, 3), (3000, 1), (19, 19)])
def test_haar_finds_nothing_in_strips_and_dots(haar: haar_module.Haar, shape: tuple[int, int]) -> None:
    faces = haar.detect(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
    assert (faces.bbox.shape, faces.kps.shape, faces.score.shape) == ((0, 4), (0, 5, 2), (0,))


@pytest.mark.parametrize("names", [("chelsea", "coffee"), pytest.param(("rocket", "retina"), marks=pytest.mark.long)])
def test_haar_is_not_certain_of_any_face_where_there_is_none(haar: haar_module.Haar, names: tuple[str, ...]) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (350, 450, 3), np.uint8)
    for image in (noise, cv2.GaussianBlur(noise, (0, 0), 6), *(getattr(data, name)() for name in names)):
        assert (haar.detect(image).score < 0.4).all()


def test_haar_turns_its_points_with_the_head(haar: haar_module.Haar) -> None:
    height, width = ASTRONAUT.shape[:2]
    turn = cv2.getRotationMatrix2D((223, 125), -12, 1)
    faces = haar.detect(cv2.warpAffine(ASTRONAUT, turn, (width, height), borderMode=cv2.BORDER_REPLICATE))
    left, right = faces.kps[0][:2]
    assert 5 < np.degrees(np.arctan2(right[1] - left[1], right[0] - left[0])) < 19


# grabcut


def crop_of(haar: haar_module.Haar, name: str) -> tuple[np.ndarray, np.ndarray]:
    kps = haar.detect(PHOTOS[name]).kps[0]
    return ffhq_crop(PHOTOS[name], kps), transform_points(ffhq_matrix(kps), kps)


@pytest.mark.parametrize("name", ["astronaut", pytest.param("hopper", marks=pytest.mark.long)])
def test_grabcut_keeps_the_face_and_not_the_corners(haar, grabcut, name: str) -> None:  # type: ignore[no-untyped-def]
    image, kps = crop_of(haar, name)
    labels = grabcut.segment(image, kps)
    assert (labels.shape, labels.dtype, set(np.unique(labels))) == ((512, 512), np.uint8, {0, 1})
    assert all(labels[int(y), int(x)] == 1 for x, y in kps)
    assert labels[:40, :40].max() == labels[:40, -40:].max() == labels[-20:, :20].max() == 0
    assert 0.15 < labels.mean() < 0.5
    again = grabcut.segment(image, kps)
    assert (labels == again).all()


def test_grabcut_splits_by_colour(grabcut) -> None:  # type: ignore[no-untyped-def]
    image = np.full((512, 512, 3), (40, 90, 200), np.uint8)
    truth = np.zeros((512, 512), np.uint8)
    cv2.ellipse(truth, (256, 290), (90, 140), 0, 0, 360, 1, -1)
    truth[100:290, 166:256] = 1  # no ellipse: the guess alone would be wrong
    image[truth == 1] = (205, 160, 130)
    noise = np.random.default_rng(2).integers(-12, 13, image.shape)
    kps = np.array([[193, 240], [319, 240], [257, 314], [201, 371], [313, 371]], np.float32)
    labels = grabcut.segment((image.astype(int) + noise).clip(0, 255).astype(np.uint8), kps)
    assert (labels == truth).mean() > 0.98


@pytest.mark.parametrize("kps", [np.full((5, 2), 256), np.array([[0, 0], [512, 0], [256, 0], [0, 512], [512, 512]])])
def test_grabcut_survives_odd_points_and_flat_pictures(grabcut, kps: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    labels = grabcut.segment(np.full((512, 512, 3), 77, np.uint8), kps.astype(np.float32))
    assert set(np.unique(labels)) <= {0, 1}


# lbp


@pytest.fixture(scope="module")
def aligned(haar: haar_module.Haar) -> dict[str, np.ndarray]:
    return {name: norm_crop(photo, haar.detect(photo).kps[0], 112) for name, photo in PHOTOS.items()}


def test_lbp_knows_a_face_again(lbp, aligned: dict[str, np.ndarray]) -> None:  # type: ignore[no-untyped-def]
    for name, other in (("astronaut", "hopper"), ("hopper", "astronaut")):
        face = aligned[name]
        changed = [face[:, ::-1], (face * 0.7).astype(np.uint8), cv2.GaussianBlur(face, (3, 3), 0)]
        same, *variants, stranger = lbp.embed(np.stack([face, *changed, aligned[other]]))
        assert min(cosine(same, variant) for variant in variants) > cosine(same, stranger) + 0.1
    assert cosine(same, variants[1]) > 0.9


def test_lbp_gives_raw_vectors_that_do_not_depend_on_the_batch(lbp, aligned) -> None:  # type: ignore[no-untyped-def]
    both = lbp.embed(np.stack([*aligned.values()]))
    assert (both.dtype, both.shape) == (np.float32, (2, 512))
    assert (np.linalg.norm(both, axis=1) > 2).all()
    fresh = backend("face_embedder", "lbp")(SETTINGS, "cpu")
    assert (fresh.embed(aligned["hopper"][None])[0] == both[1]).all()
    assert lbp.embed(np.empty((0, 112, 112, 3), np.uint8)).shape == (0, 512)


# patches


def test_patches_have_the_shapes_and_the_range_of_clip(patches) -> None:  # type: ignore[no-untyped-def]
    images = np.stack([cv2.resize(photo, (224, 224)) for photo in PHOTOS.values()])
    features = patches.embed(images)
    assert {name: (column.shape, column.dtype) for name, column in features.items()} == {
        "clip": ((2, 1024), np.float16),
        "clip_hidden": ((2, 257, 1280), np.float16),
    }
    for column in features.values():
        assert 0.2 < np.sqrt(np.mean(column.astype(np.float64) ** 2)) < 3
    alone = backend("image_embedder", "patches")(SETTINGS, "cpu").embed(images[1:])
    assert all((alone[name][0] == features[name][1]).all() for name in features)
    assert patches.embed(images[:0])["clip_hidden"].shape == (0, 257, 1280)


def test_patches_change_only_where_the_picture_does(patches) -> None:  # type: ignore[no-untyped-def]
    image = cv2.resize(ASTRONAUT, (224, 224))
    changed = image.copy()
    changed[3 * 14 + 3 : 4 * 14 - 3, 5 * 14 + 3 : 6 * 14 - 3] = (255, 0, 0)  # inside patch (3, 5)
    before, after = patches.embed(np.stack([image, changed]))["clip_hidden"]
    assert [int(row) for row in np.flatnonzero((before != after).any(axis=1))] == [0, 1 + 3 * 16 + 5]
