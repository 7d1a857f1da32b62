"""The judge of validation images: what is refused, and real faces where given."""

import socket
import warnings

import cv2
import numpy as np
import pytest

from pipeline.train.validate.judge import IdJudge
from schemas.errors import WeightsError


def norm_crop(image, kps, size=112):
    from insightface.utils import face_align

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return face_align.norm_crop(image, kps, size)


def similarity(judge, photo, crop):
    """Cosine between the largest face of a photo and an aligned crop; None without a face."""
    look = judge.look(photo)
    return None if look is None else float(look.embedding @ judge.embed(crop))


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def refuse(*_args, **_options):
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("pack", ["buffalo_l", "antelopev2", "/nowhere/pack", ""])
def test_a_pack_that_is_not_there_is_refused_and_never_fetched(pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=r"watch\.judge: .*is no folder with an insightface pack"):
        IdJudge(pack)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_a_pack_of_damaged_files_is_refused(content, tmp_path):
    (tmp_path / "det_10g.onnx").write_bytes(content)
    with pytest.raises(WeightsError, match="fetch the pack again"):
        IdJudge(str(tmp_path))


@pytest.mark.real_data
@pytest.mark.parametrize(("file", "missing"), [("det_2.5g.onnx", "recognition"), ("w600k_mbf_int8.onnx", "detection")])
def test_half_a_pack_is_refused(file, missing, tmp_path, data):
    (tmp_path / file).symlink_to(data / "models" / "real" / file)
    with pytest.raises(WeightsError, match=f"holds no {missing} model"):
        IdJudge(str(tmp_path))


@pytest.fixture(scope="module")
def judge(data):
    return IdJudge(str(data / "models" / "real"))


@pytest.fixture(scope="module")
def people(data, judge):
    """Photos (RGB) and their aligned 224 crops: twice the same man, and another one."""
    photos, crops = [], []
    for name in ("face_recogniti__obama3.jpg", "face_recogniti__obama1.jpg", "face_recogniti__biden2.jpg"):
        bgr = cv2.imread(str(data / "photos" / name))
        boxes, kps = judge._app.det_model.detect(bgr, max_num=1, metric="default")
        assert len(boxes) == 1
        photos.append(np.ascontiguousarray(bgr[..., ::-1]))
        crops.append(norm_crop(photos[-1], kps[0], 224))
    return photos, crops


@pytest.mark.long
@pytest.mark.real_data
def test_the_judge_knows_the_same_photo_the_same_man_and_another(judge, people):
    (first, _second, other), crops = people
    itself, again = similarity(judge, first, crops[0]), similarity(judge, first, crops[1])
    another = similarity(judge, other, crops[0])
    assert itself > 0.95
    assert 0.5 < again < 0.95
    assert another < 0.2


@pytest.mark.long
@pytest.mark.real_data
def test_no_face_is_none_and_a_small_photo_will_do(judge, people):
    photos, crops = people
    small = cv2.resize(photos[0], (320, 320 * photos[0].shape[0] // photos[0].shape[1]))
    noise = np.random.default_rng(0).integers(0, 255, small.shape, dtype=np.uint8)
    assert judge.look(noise) is None
    assert similarity(judge, small, crops[0]) > 0.8


@pytest.mark.long
@pytest.mark.real_data
def test_the_largest_face_counts(judge, people):
    photos, crops = people
    height, width = photos[2].shape[:2]
    both = np.zeros((height, width * 2, 3), np.uint8)
    both[:, :width] = photos[2]
    small = cv2.resize(photos[0], (width // 2, width * photos[0].shape[0] // photos[0].shape[1] // 2))[:height]
    both[: len(small), width : width + small.shape[1]] = small
    boxes, _ = judge._app.det_model.detect(np.ascontiguousarray(both[..., ::-1]), max_num=0, metric="default")
    assert len(boxes) == 2
    assert similarity(judge, both, crops[2]) > 0.8


@pytest.mark.long
@pytest.mark.real_data
def test_the_judge_takes_rgb(judge, people):
    photos, crops = people
    right = similarity(judge, photos[0], crops[0])
    swapped = np.ascontiguousarray(photos[0][..., ::-1])
    assert (similarity(judge, swapped, crops[0]) or 0) < right - 0.02


@pytest.mark.long
@pytest.mark.real_data
def test_a_face_that_fills_the_image_is_found(judge, people):
    photos, crops = people
    boxes, _ = judge._app.det_model.detect(np.ascontiguousarray(photos[2][..., ::-1]), max_num=0, metric="default")
    left, top, right, bottom = boxes[0, :4].astype(int)
    tight = np.ascontiguousarray(photos[2][top + 20 : bottom - 20, left + 20 : right - 20])
    assert not judge._app.det_model.detect(np.ascontiguousarray(tight[..., ::-1]), max_num=0, metric="default")[0].size
    assert similarity(judge, tight, crops[2]) > 0.8


@pytest.mark.long
@pytest.mark.real_data
def test_the_judge_s_licence_is_known_by_its_hash_and_else_not_known(judge):
    detector, recogniser = judge.weights
    assert (detector["name"], detector["task"]) == ("det_2.5g", "detector")
    assert "non-commercial" in detector["licence"]
    assert (recogniser["task"], recogniser["licence"], len(recogniser["sha256"])) == ("face_embedder", "not known", 64)
