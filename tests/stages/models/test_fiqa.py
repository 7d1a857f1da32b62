"""Quality for recognition: files of both layouts, what they are fed, and what is refused."""

from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from skimage import data as pictures

from pipeline.dataset.config import load_config
from pipeline.dataset.plan import make_plan
from schemas.errors import WeightsError
from stages.models.backends import backend
from stages.models.papers import WEIGHTS
from stages.settings import ModelSettings

FACE = np.ascontiguousarray(pictures.astronaut()[70:182, 170:282])


def net(path: Path, side: int, numbers: int) -> str:
    """Writes a net whose first number is the mean of the first colour; of a further one each, that of the last."""
    shape = ["N", 3, side, side]
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["colours"], axes=[2, 3], keepdims=0),
        helper.make_node("Gather", ["colours", "which"], ["y"], axis=1),
    ]
    which = helper.make_tensor("which", TensorProto.INT64, [numbers], [0, *[2] * (numbers - 1)])
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", numbers])],
        [which],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    return str(path)


def test_either_layout_gets_rgb_as_it_was_trained(tmp_path: Path) -> None:
    face = np.full((1, 112, 112, 3), (255, 128, 0), np.uint8)
    ediffiqa = net(tmp_path / "a.onnx", 112, 1)
    model = backend("fiqa", ediffiqa)(ModelSettings(fiqa=ediffiqa), "cpu")
    assert model.score(face).tolist() == [1]
    assert model.score(face[..., ::-1]).tolist() == [-1]
    assert model.score(face[:0]).shape == (0,)
    pose_quality = net(tmp_path / "b.onnx", 96, 18)
    model = backend("fiqa", pose_quality)(ModelSettings(fiqa=pose_quality), "cpu")
    assert model.score(face).tolist() == [1], "no point shows badly"
    assert model.score(face[..., ::-1]).tolist() == [1 - 255]


def test_what_is_no_such_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    for path, words in (
        (str(tmp_path / "missing.onnx"), "does not exist: correct it, or set ediffiqa-t"),
        (str(tmp_path / "junk.onnx"), r"cannot be used as models\.fiqa"),
        (net(tmp_path / "c.onnx", 112, 18), "it makes 18 numbers of a picture of 112 px, not 1 of 112"),
    ):
        with pytest.raises(WeightsError, match=words):
            backend("fiqa", path)(ModelSettings(fiqa=path), "cpu")


def test_its_licence_stands_in_the_plan_and_is_kept_to(tmp_path: Path) -> None:
    path = net(tmp_path / "a.onnx", 112, 1)
    usual, words = make_plan(load_config(None, [], shards="sample")), [f"models.fiqa={path}", "filter.min_fiqa=0.5"]
    with pytest.raises(WeightsError, match=r"may not be used commercially: a\.onnx \(not known"):
        make_plan(load_config(None, words, shards="sample"))
    plan = make_plan(load_config(None, [*words, "models.accept_noncommercial=true"], shards="sample"))
    assert plan.identity["settings"]["models"] == usual.identity["settings"]["models"]
    (card,) = [card for card in plan.cards if card.task == "fiqa"]
    assert (card.name, card.licence) == ("a.onnx", "not known: the table of weights names none")
    permissive = load_config(None, [f"models.fiqa={path}"], profile="permissive")
    assert "a.onnx (not known" in make_plan(permissive, dry_run=True).refusal
    permissive = load_config(None, ["models.fiqa=ediffiqa-t"], profile="permissive")
    plan = make_plan(permissive, dry_run=True)
    assert WEIGHTS["ediffiqa-t"] in [one.weight for one in plan.lacks]
    assert "licences" not in plan.refusal


@pytest.mark.real_data
def test_a_blurred_face_scores_less(data: Path) -> None:
    path = str(data / "models/extra/inspireface_pose-quality.onnx")
    model = backend("fiqa", path)(ModelSettings(fiqa=path), "cpu")
    blurred = [np.asarray(cv2.GaussianBlur(FACE, (0, 0), sigma), np.uint8) for sigma in (2, 4, 8)]
    noise = np.random.default_rng(0).integers(0, 256, FACE.shape, np.uint8)
    scores = model.score(np.stack([FACE, *blurred, noise])).tolist()
    assert scores[0] > 0.7
    assert scores[:4] == sorted(scores[:4], reverse=True)
    assert scores[-1] < 0.5
