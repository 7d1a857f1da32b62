"""SCRFD, ArcFace and YuNet: the same numbers as insightface's own loop, and nobody overlooked."""

import itertools
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from schemas.arrays import Image
from schemas.errors import ConfigError, PlanError, WeightsError
from stages.models import packs
from stages.models.backends import Faces
from stages.models.detectors import scrfd
from stages.models.detectors.scrfd import Scrfd
from stages.models.detectors.yunet import YuNet
from stages.models.face_embedders.arcface import ArcFace
from stages.models.onnx import session_options
from stages.settings import ModelSettings

RNG = np.random.default_rng(0)


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], **arrays: npt.NDArray[Any]) -> None:
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, str(path))


def tensor(name: str, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def recogniser(path: Path, dimension: int = 512) -> None:
    """A random projection of the averaged face, in the shape of a recogniser."""
    nodes = [
        helper.make_node("AveragePool", ["input"], ["pooled"], kernel_shape=[14, 14], strides=[14, 14]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["vector"]),
    ]
    weights = RNG.normal(size=(3 * 64, dimension)).astype(np.float32)
    save(path, nodes, [tensor("input", "n", 3, 112, 112)], [tensor("vector", "n", dimension)], weights=weights)


def detector(path: Path, *, kps: bool = True, side: int | str = "side") -> None:
    """SCRFD's outputs; the score of an anchor is the brightness of its cell, boxes reach 2 cells to each side."""
    nodes, outputs = [], []
    arrays: dict[str, npt.NDArray[Any]] = {}
    for stride in (8, 16, 32):
        nodes.append(
            helper.make_node("AveragePool", ["x"], [f"p{stride}"], kernel_shape=[stride] * 2, strides=[stride] * 2)
        )
    for kind, width in (("score", 1), ("bbox", 4), ("kps", 10))[: 3 if kps else 2]:
        for stride in (8, 16, 32):
            name, weights = f"{kind}{stride}", np.zeros((2 * width, 3, 1, 1), np.float32)
            weights[0 if kind == "score" else slice(0), :] = 1 / 3
            bias = {"score": 0.0, "bbox": 2.0, "kps": 0.5}[kind]
            arrays |= {f"w{name}": weights, f"b{name}": np.full(2 * width, bias, np.float32)}
            arrays[f"s{name}"] = np.array([-1, width], np.int64)
            nodes += [
                helper.make_node("Conv", [f"p{stride}", f"w{name}", f"b{name}"], [f"c{name}"]),
                helper.make_node("Transpose", [f"c{name}"], [f"t{name}"], perm=[2, 3, 0, 1]),
                helper.make_node("Reshape", [f"t{name}", f"s{name}"], [name]),
            ]
            outputs.append(tensor(name, f"n{stride}", width))
    save(path, nodes, [tensor("x", 1, 3, side, side)], outputs, **arrays)


@pytest.fixture
def toy(tmp_path: Path) -> ModelSettings:
    """A pack under names that nobody knows, with a distracting third graph."""
    detector(tmp_path / "zz.onnx")
    recogniser(tmp_path / "yy.onnx")
    pixels = [tensor("x", 1, 3, 96, 96)]
    save(tmp_path / "aa.onnx", [helper.make_node("Flatten", ["x"], ["y"])], pixels, [tensor("y", 1, 27648)])
    return ModelSettings(pack=str(tmp_path))


def spot(image: Image, x: int, y: int, side: int) -> None:
    image[y : y + side, x : x + side] = 255


# --- with graphs made here


def test_finds_the_files_of_a_pack_by_their_graphs(toy: ModelSettings) -> None:
    assert packs.pack_file("detector", toy).name == "zz.onnx"
    assert packs.pack_file("face_embedder", toy).name == "yy.onnx"
    assert [card.task for card in (*Scrfd.cards(toy), *ArcFace.cards(toy))] == ["detector", "face_embedder"]


def test_maps_boxes_and_points_back_to_the_photo(toy: ModelSettings) -> None:
    photo = np.zeros((1280, 960, 3), np.uint8)
    spot(photo, 640, 960, 64)
    faces = Scrfd(toy, "cpu").detect(photo)
    best = faces.bbox[0]
    assert faces.score[0] > 0.9
    assert np.all(best[:2] <= (672, 992))
    assert np.all(best[2:] >= (640, 960))
    assert np.linalg.norm(faces.kps[0] - (672, 992), axis=1).max() < 100


def test_detects_nothing_in_darkness(toy: ModelSettings) -> None:
    faces = Scrfd(toy, "cpu").detect(np.zeros((300, 200, 3), np.uint8))
    assert (faces.bbox.shape, faces.kps.shape, faces.score.shape) == ((0, 4), (0, 5, 2), (0,))
    assert faces.bbox.dtype == faces.kps.dtype == faces.score.dtype == np.float32


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (7, 3)])
def test_odd_photos_do_not_break_the_detector(shape: tuple[int, int], toy: ModelSettings) -> None:
    photo, screen = np.full((*shape, 3), 255, np.uint8), Scrfd.screen(toy, "cpu")
    Scrfd(toy, "cpu").detect(photo)
    assert screen is not None
    screen([photo])


@pytest.mark.parametrize(("width", "height"), [(1000, 500), (333, 777), (1024, 1024)])
def test_bordered_view_points_at_the_same_pixels(width: int, height: int) -> None:
    photo = np.zeros((height, width, 3), np.uint8)
    photo[height // 3 - 8 : height // 3 + 8, width // 4 - 8 : width // 4 + 8] = 255
    view = scrfd._bordered(photo, 640, 0.5)
    rows, columns = np.nonzero(view.canvas[:, :, 0] > 127)
    found = (np.array([columns.mean() + 0.5, rows.mean() + 0.5]) - view.shift) / view.scale
    assert np.abs(found - (width // 4, height // 3)).max() < 1.5
    assert not view.canvas[: view.shift].any()


def test_a_weak_box_hides_no_second_face() -> None:
    def faces(*rows: tuple[float, float, float, float, float]) -> Faces:
        array = np.array(rows, np.float32)
        return Faces(array[:, :4], np.zeros((len(rows), 5, 2), np.float32), array[:, 4])

    first = faces((0, 0, 100, 100, 0.9), (200, 0, 300, 100, 0.3))
    further = faces((5, 5, 95, 95, 0.8), (205, 0, 295, 100, 0.7), (40, 40, 60, 60, 0.6), (0, 500, 9, 509, 0.4))
    merged = scrfd._merge(first, further, 0.5, 0.5)
    np.testing.assert_allclose(merged.score, [0.9, 0.7, 0.3])


def test_what_lies_in_the_border_is_no_face(toy: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = np.array([[-30, -30, 10, 10], [-10, 40, 60, 120]], np.float32)
    seen = Faces(boxes, np.zeros((2, 5, 2), np.float32), np.ones(2, np.float32))
    detector = Scrfd(toy, "cpu")
    monkeypatch.setattr(detector, "_look", lambda views: [seen])
    (faces,) = detector._padded([np.zeros((100, 100, 3), np.uint8)], 64)
    np.testing.assert_array_equal(faces.bbox, [[0, 40, 60, 100]])


def test_detector_without_points_is_refused(tmp_path: Path) -> None:
    detector(tmp_path / "det.onnx", kps=False)
    with pytest.raises(WeightsError, match="without the five points"):
        Scrfd(ModelSettings(pack=str(tmp_path)), "cpu")


def test_detector_of_another_fixed_size_is_refused(tmp_path: Path) -> None:
    detector(tmp_path / "det.onnx", side=320)
    with pytest.raises(ConfigError, match=r"models\.det_size = 320"):
        Scrfd(ModelSettings(pack=str(tmp_path)), "cpu")
    photo = np.zeros((400, 400, 3), np.uint8)
    spot(photo, 100, 100, 200)
    assert len(Scrfd(ModelSettings(pack=str(tmp_path), det_size=320), "cpu").detect(photo).score)


def test_recogniser_gets_rgb_in_its_own_scale(toy: ModelSettings) -> None:
    faces = RNG.integers(0, 256, (3, 112, 112, 3), np.uint8)
    found = ArcFace(toy, "cpu").embed(faces)
    model = onnx.load(str(packs.pack_file("face_embedder", toy)))
    weights = numpy_helper.to_array(model.graph.initializer[0])
    pixels = (faces.astype(np.float32).transpose(0, 3, 1, 2) - 127.5) / 127.5
    pooled = pixels.reshape(3, 3, 8, 14, 8, 14).mean(axis=(3, 5)).reshape(3, -1)
    np.testing.assert_allclose(found, pooled @ weights, rtol=1e-3, atol=1e-3)
    assert found.dtype == np.float32


def test_vectors_do_not_depend_on_the_batch(toy: ModelSettings) -> None:
    embedder = ArcFace(toy, "cpu")
    faces = RNG.integers(0, 256, (4, 112, 112, 3), np.uint8)
    assert embedder.embed(faces)[2].tobytes() == embedder.embed(faces[2:3])[0].tobytes()


def test_recogniser_of_another_width_is_refused(tmp_path: Path) -> None:
    recogniser(tmp_path / "rec.onnx", 128)
    with pytest.raises(WeightsError, match="gives 128 values"):
        ArcFace(ModelSettings(pack=str(tmp_path)), "cpu")


def test_garbage_under_a_known_name_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "det_10g.onnx").write_bytes(b"garbage" * 99)
    with pytest.raises(WeightsError, match="cannot be loaded"):
        Scrfd(ModelSettings(pack=str(tmp_path)), "cpu")
    with pytest.raises(WeightsError, match="cannot be loaded"):
        YuNet(ModelSettings(paths={"yunet": str(tmp_path / "det_10g.onnx")}), "cpu")


def test_recogniser_in_the_detectors_place_is_refused(tmp_path: Path) -> None:
    recogniser(tmp_path / "det_10g.onnx")
    with pytest.raises(WeightsError, match="not a detection model"):
        Scrfd(ModelSettings(pack=str(tmp_path)), "cpu")


def test_gpu_that_is_absent_is_an_error(toy: ModelSettings) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has a GPU")
    with pytest.raises(PlanError, match=r"executor\.gpus = 0"):
        Scrfd(toy, "cuda")


def test_pack_with_insightfaces_manifest(tmp_path: Path) -> None:
    detector(tmp_path / "one.onnx")
    recogniser(tmp_path / "two.onnx")
    tasks = {
        "detection": {"file": "one.onnx", "preprocessing": {"mean": 127.5, "std": 128.0}},
        "recognition": {"file": "two.onnx", "preprocessing": {"mean": 0.0, "std": 255.0}},
    }
    manifest = {"manifest_version": 2, "model_id": "toy", "tasks": tasks, "license": "MODEL.LICENSE"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "MODEL.LICENSE").write_text("any")
    settings = ModelSettings(pack=str(tmp_path), det_size=128)
    assert len(Scrfd(settings, "cpu").detect(np.full((64, 64, 3), 255, np.uint8)).score)
    assert ArcFace(settings, "cpu")._model.input_std == 255.0


# --- with the real pack


@pytest.fixture(scope="module")
def real(data: Path) -> ModelSettings:
    return ModelSettings(pack=str(data / "models" / "real"), paths={"yunet": str(data / "models" / "extra")})


@pytest.fixture(scope="module")
def app(real: ModelSettings) -> Any:
    """insightface's own loop."""
    from insightface.app import FaceAnalysis

    options = {"providers": ["CPUExecutionProvider"], "sess_options": session_options()}
    app = FaceAnalysis(real.pack, allowed_modules=["detection", "recognition"], **options)
    app.prepare(-1, det_size=(640, 640))
    return app


@pytest.fixture(scope="module")
def keepers(data: Path, labels: list[dict[str, str]]) -> dict[str, Image]:
    """The photos to keep, RGB."""
    names = [row["file"] for row in labels if row["expected"] == "keep"]
    return {name: read(data, name) for name in names}


@pytest.fixture(scope="module")
def seen(real: ModelSettings, keepers: dict[str, Image]) -> dict[str, Faces]:
    """What the detector finds in the photos to keep."""
    detector = Scrfd(real, "cpu")
    return {name: detector.detect(photo) for name, photo in keepers.items()}


@pytest.fixture(scope="module")
def boxes(seen: dict[str, Faces]) -> dict[str, npt.NDArray[np.float32]]:
    return {name: faces.bbox[0] for name, faces in seen.items()}


def read(data: Path, name: str) -> Image:
    return np.asarray(cv2.cvtColor(cv2.imread(str(data / "photos" / name)), cv2.COLOR_BGR2RGB), np.uint8)


def one_face(faces: Faces) -> bool:
    """Whether a filter with the default thresholds would count exactly one face."""
    return int((faces.score >= 0.5).sum()) == 1 and (len(faces.score) == 1 or faces.score[1] <= 0.4)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("shape", "count"),
    [((640, 640), 1), ((192, 192), 3), ((128, 256), 3), pytest.param((640, 640), 3, marks=pytest.mark.long)],
)
def test_boxes_are_decoded_bit_by_bit_as_insightface_does(
    shape: tuple[int, int], count: int, real: ModelSettings, keepers: dict[str, Image]
) -> None:
    network = scrfd._network(real, "cpu")
    for photo in [*itertools.islice(keepers.values(), count), RNG.integers(0, 256, (*shape, 3), np.uint8)]:
        canvas = cv2.resize(photo, shape[::-1])
        theirs = [np.concatenate(parts) for parts in network._model.forward(canvas, 0.02)]
        assert len(theirs[0]) > 0
        (ours,) = network([canvas], 0.02)
        for values, expected in zip(ours, (theirs[0].ravel(), *theirs[1:]), strict=True):
            np.testing.assert_array_equal(values, expected)
        ((best, scores, boxes),) = network.screened([canvas], 0.02)  # by a session for any size
        assert best == scores.max() == pytest.approx(theirs[0].max(), abs=1e-5)
        np.testing.assert_allclose(boxes, theirs[1], atol=0.01)


@pytest.mark.real_data
@pytest.mark.filterwarnings("ignore:`estimate` is deprecated:FutureWarning")
@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.long)])
def test_same_faces_and_vectors_as_insightfaces_loop(
    step: int, real: ModelSettings, app: Any, keepers: dict[str, Image], seen: dict[str, Faces]
) -> None:
    from insightface.utils import face_align

    embedder = ArcFace(real, "cpu")
    for name, photo in [*keepers.items()][::step]:
        (theirs,) = app.get(np.ascontiguousarray(photo[:, :, ::-1]))
        faces = seen[name]
        assert np.abs(faces.kps[0] - theirs.kps).max() < 0.01, name
        assert np.abs(faces.bbox[0] - theirs.bbox).max() < 0.01, name
        vector = embedder.embed(face_align.norm_crop(photo, theirs.kps)[None])[0]
        assert vector / np.linalg.norm(vector) @ theirs.normed_embedding > 0.99999, name


@pytest.mark.real_data
def test_labelled_photos_are_judged_as_labelled(
    real: ModelSettings, data: Path, labels: list[dict[str, str]], seen: dict[str, Faces]
) -> None:
    detector = Scrfd(real, "cpu")
    for row in labels:
        if min(int(row["width"]), int(row["height"])) < 1024:
            continue
        faces = seen.get(row["file"]) or detector.detect(read(data, row["file"]))
        large = len(faces.bbox) > 0 and (faces.bbox[0, 2:] - faces.bbox[0, :2]).min() >= 128
        assert (one_face(faces) and large) == (row["expected"] == "keep"), row["file"]


def tight(photo: Image, box: npt.NDArray[np.float32], factor: float, height: int = 1024) -> Image:
    """The face's box, grown by a factor, enlarged to a height."""
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * factor
    x1, y1 = np.maximum(centre - half, 0).astype(int)
    x2, y2 = (centre + half).astype(int)
    crop = photo[y1:y2, x1:x2]
    size = round(crop.shape[1] * height / crop.shape[0]), height
    return np.asarray(cv2.resize(crop, size, interpolation=cv2.INTER_CUBIC), np.uint8)


Boxes = dict[str, npt.NDArray[np.float32]]


@pytest.mark.real_data
@pytest.mark.parametrize("step", [10, pytest.param(1, marks=pytest.mark.long)])
def test_tight_crops_are_not_lost(step: int, real: ModelSettings, keepers: dict[str, Image], boxes: Boxes) -> None:
    detector = Scrfd(real, "cpu")
    lost_at_first, some = 0, list(keepers)[::step]
    for name in some:
        for factor in (1.0, 1.2, 1.4):
            crop = tight(keepers[name], boxes[name], factor)
            (first,) = detector._look([scrfd._letterbox(crop, 640)])
            lost_at_first += not np.any(first.score >= 0.5)
            faces = detector.detect(crop)
            assert one_face(faces), (name, factor)
            assert np.all((faces.kps[0] > 0) & (faces.kps[0] < crop.shape[1::-1])), (name, factor)
            assert faces.bbox[0].min() >= -0.2 * max(crop.shape), (name, factor)
    assert lost_at_first > len(some), "the further looks must be what finds them"


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("factor", "step"),
    [(1.2, 45), *(pytest.param(one, 5, marks=pytest.mark.long) for one in (0.9, 1.0, 1.2))],
)
def test_two_faces_are_never_one(
    factor: float, step: int, real: ModelSettings, keepers: dict[str, Image], boxes: Boxes
) -> None:
    detector = Scrfd(real, "cpu")
    for a, b in itertools.islice(itertools.combinations(keepers, 2), 0, None, step):
        left, right = (tight(keepers[name], boxes[name], factor) for name in (a, b))
        small = tight(keepers[b], boxes[b], factor, 512)
        beside = np.full((1024, small.shape[1], 3), 90, np.uint8)
        beside[512:] = small
        for photo in (np.hstack((left, right)), np.hstack((left, beside))):
            assert not one_face(detector.detect(photo)), (a, b)


@pytest.mark.real_data
@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.long)])
def test_yunet_sees_the_same_faces_with_points_in_our_order(
    step: int, real: ModelSettings, keepers: dict[str, Image], seen: dict[str, Faces]
) -> None:
    yunet = YuNet(real, "cpu")
    for name, photo in [*keepers.items()][::step]:
        found, expected = yunet.detect(photo), seen[name]
        eyes = np.linalg.norm(expected.kps[0, 1] - expected.kps[0, 0])
        assert np.abs(found.kps[0] - expected.kps[0]).max() < 0.25 * eyes, name
        assert found.score[0] > 0.8
        assert np.all(np.diff(found.score) <= 0)


def test_a_box_in_a_photo_wider_than_opencv_warps_is_looked_at_closer():
    near = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    wide = np.hstack([near, np.zeros((300, 33_000, 3), np.uint8)])
    box, score = np.array([[100, 80, 180, 170]], np.float32), np.ones(1, np.float32)
    for turn in (0, 45):
        (expected,), (crop,) = (scrfd._closer(photo, box, score, turn) for photo in (near, wide))
        assert (crop == expected).all()
