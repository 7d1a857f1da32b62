"""Models of packs on torch: the numbers of ONNX Runtime, whatever the batch, and images that do not mix."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from onnx import helper
from tiny_packs import detector, pictures, recogniser, save, tensor

from schemas.arrays import Image
from schemas.errors import PlanError, WeightsError
from stages.models.backends import Faces
from stages.models.boxes import without_overlaps
from stages.models.detectors.scrfd import Scrfd, _letterbox, _proof_photos
from stages.models.face_embedders.arcface import ArcFace
from stages.models.torch_backend import prepare
from stages.settings import ModelSettings

prepare("cpu")
torch = pytest.importorskip("torch")

from stages.models import onnx_torch  # noqa: E402
from stages.models.detectors.scrfd_torch import ScrfdTorch  # noqa: E402
from stages.models.face_embedders.arcface_torch import ArcFaceTorch  # noqa: E402
from stages.models.torch_backend import Batches, Together  # noqa: E402

RNG = np.random.default_rng(0)
ON_TORCH: dict[str, Any] = {"detector": "torch", "face_embedder": "torch"}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    detector(tmp_path / "det_toy.onnx")
    recogniser(tmp_path / "rec_toy.onnx")
    return tmp_path


def in_batches(settings: ModelSettings, size: int) -> Scrfd:
    """The detector on torch, with a batch as it has it on a GPU."""
    found = Scrfd(settings, "cpu")
    found._model = ScrfdTorch(found._model._path, "cpu", size=size)
    return found


def require_same(found: list[Faces], expected: list[Faces], tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert [part.shape for part in ours] == [part.shape for part in theirs]
        for part, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(part, other, atol=tolerance)


def test_a_packs_detector_gives_on_torch_what_it_gives_on_onnx_runtime(toy: Path) -> None:
    photos = [cv2.resize(picture, size) for picture, size in zip(pictures(3, 64), [(90, 200), (300, 120), (256, 256)])]  # noqa: B905
    settings = {"pack": str(toy), "det_size": 128}
    expected = Scrfd(ModelSettings(**settings), "cpu").detect_all(photos)
    assert min(len(faces.score) for faces in expected) > 3
    for size in (1, 2):
        require_same(in_batches(ModelSettings(**settings, runtime=ON_TORCH), size).detect_all(photos), expected, 0.01)


def test_images_of_a_batch_do_not_mix(toy: Path) -> None:
    canvases = pictures(5, 96)
    network = ScrfdTorch(toy / "det_toy.onnx", "cpu", size=4)
    together = network(canvases, 0.3)
    assert len({len(found.scores) for found in together}) > 1
    for canvas, found in zip(canvases, together, strict=True):
        (alone,) = network([canvas], 0.3)
        assert all((part == other).all() for part, other in zip(found, alone, strict=True))


def test_a_recogniser_that_was_exported_for_one_face_takes_many(toy: Path) -> None:
    faces = np.stack(pictures(5, 112))
    expected = ArcFace(ModelSettings(pack=str(toy)), "cpu").embed(faces)
    for size in (1, 4):
        found = ArcFaceTorch(toy / "rec_toy.onnx", "cpu", size=size).embed(faces)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    found = ArcFace(ModelSettings(pack=str(toy), runtime=ON_TORCH), "cpu").embed(faces)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_what_mixes_the_images_of_a_batch_is_refused(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canvases, faces = pictures(2, 96), pictures(2, 112)
    ScrfdTorch(toy / "det_toy.onnx", "cpu", size=2).require_same(canvases, 0.2)
    ArcFaceTorch(toy / "rec_toy.onnx", "cpu", size=2).require_same(faces)
    # images behind the other axes, as the file itself puts them
    monkeypatch.setattr(onnx_torch, "_reshape_each", lambda x, shape: x.permute(1, 2, 0, 3).reshape(x.shape[0], *shape))
    with pytest.raises(PlanError, match="gives other faces on torch"):
        ScrfdTorch(toy / "det_toy.onnx", "cpu", size=2).require_same(canvases, 0.2)
    recogniser = ArcFaceTorch(toy / "rec_toy.onnx", "cpu", size=2)
    recogniser.batches._compute = lambda batch, compute=recogniser.batches._compute: (compute(batch)[0].flip(0),)
    recogniser.batches._of_shape.clear()
    with pytest.raises(PlanError, match="gives other vectors on torch"):
        recogniser.require_same(faces)


@pytest.mark.long
def test_torch_can_compile_a_pack_as_one_graph(toy: Path) -> None:
    network, images = ScrfdTorch(toy / "det_toy.onnx", "cpu"), torch.from_numpy(np.stack(pictures(2, 96)))
    recogniser, faces = ArcFaceTorch(toy / "rec_toy.onnx", "cpu"), torch.from_numpy(np.stack(pictures(2, 112)))
    with torch.inference_mode():
        for compute, given in ((network._decoded, images), (recogniser.batches._compute, faces)):
            traced = torch.compile(compute, dynamic=False, fullgraph=True, backend="eager")
            torch.testing.assert_close(traced(given), compute(given))


def test_in_float16_boxes_are_not_rounded_at_the_end(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canvases = pictures(3, 320)
    expected = ScrfdTorch(toy / "det_toy.onnx", "cpu")(canvases, 0.0)

    def difference() -> float:
        found = ScrfdTorch(toy / "det_toy.onnx", "cpu", dtype=torch.float16)(canvases, 0.0)
        return max(float(np.abs(ours.boxes - theirs.boxes).max()) for ours, theirs in zip(found, expected, strict=True))

    exact = difference()
    monkeypatch.setattr(onnx_torch, "_conv_in_float32", onnx_torch._conv)
    assert 0 < exact < 0.8 * difference()


def test_operators_that_are_not_known_are_one_sentence(tmp_path: Path) -> None:
    nodes = [helper.make_node("Erf", ["x"], ["y"]), helper.make_node("Celu", ["y"], ["z"])]
    save(tmp_path / "odd.onnx", nodes, [tensor("x", 1, 3, 8, 8)], [tensor("z", 1, 3, 8, 8)], {})
    with pytest.raises(WeightsError, match=r"odd\.onnx uses Celu, Erf, which models\.runtime = torch does not know"):
        onnx_torch.OnnxModule(tmp_path / "odd.onnx")
    (tmp_path / "garbage.onnx").write_bytes(b"garbage" * 99)
    with pytest.raises(WeightsError, match="cannot be loaded"):
        onnx_torch.OnnxModule(tmp_path / "garbage.onnx")


def test_batches_have_one_size_and_the_last_is_cut() -> None:
    sizes = []

    def compute(images: Any) -> tuple[Any, ...]:
        sizes.append(len(images))
        return (images.float().mean((1, 2, 3)),)

    images = [np.full((4, 4, 3), value, np.uint8) for value in range(7)]
    means = [float(mean) for (mean,) in Batches(compute, 3, "cpu")(images)]
    assert (means, sizes) == ([0, 1, 2, 3, 4, 5, 6], [3, 3, 3])
    assert Batches(compute, 3, "cpu")([]) == []


def test_threads_share_batches_of_any_shapes_in_the_order_of_each() -> None:
    sizes = []

    def compute(images: Any) -> tuple[Any, ...]:
        sizes.append(images.shape[1])
        time.sleep(0.005)
        return (images.float().amax((1, 2, 3)),)

    batches = Batches(compute, 8, "cpu", read=lambda found, offset: [float(each) + offset for each in found])
    together = threading.Barrier(12)

    def call(thread: int) -> None:
        for turn in range(10):
            together.wait(60)
            values = [(thread * 7 + turn * 3 + i) % 200 for i in range(turn % 4)]
            images = [np.full((4 + 4 * (value % 2), 4, 3), value, np.uint8) for value in values]
            assert batches(images, 0.5 * (thread % 2)) == [value + 0.5 * (thread % 2) for value in values]

    with ThreadPoolExecutor(12) as threads:
        for done in [threads.submit(call, thread) for thread in range(12)]:
            done.result()
    assert set(sizes) == {4, 8}
    assert len(sizes) < 12 * 11, "nobody shared a batch"


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_what_fails_for_one_thread_fails_for_no_other(order: tuple[int, int]) -> None:
    enter, gathered = threading.Barrier(2), threading.Event()

    def compute(kind: None, values: list[int]) -> list[int]:
        if values == [0]:
            enter.wait(60)
            gathered.wait(60)
        if 1 in values:
            raise RuntimeError("of 1")
        return [10 * value for value in values]

    together = Together(compute)
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(together, [(None, 0)])
        enter.wait(60)
        others = {}
        for number, value in enumerate(order, 1):  # one after the other, so that mostly the first has its turn first
            others[value] = threads.submit(together, [(None, value)])
            while len(together._waiting) < number:
                time.sleep(0.001)
            time.sleep(0.01)
        gathered.set()
        assert (first.result(), others[2].result()) == ([0], [20])
        with pytest.raises(RuntimeError, match="of 1"):
            others[1].result()


def test_the_next_batch_lies_ready_before_the_last_is_read() -> None:
    batches = Batches(lambda images: (images.clone(),), 2, "cpu", read=lambda found: read(found))

    def read(found: Any) -> list[int]:
        hosts = batches._of_shape[1, 1, 3][0]
        ready.append(sorted(hosts[:, :, 0, 0, 0].flatten().tolist()))
        return [int(each) for each in found[:, 0, 0, 0]]

    ready: list[list[int]] = []
    assert batches([np.full((1, 1, 3), value, np.uint8) for value in range(1, 6)]) == [1, 2, 3, 4, 5]
    assert ready == [[1, 2, 3, 4], [2, 3, 4, 5], [2, 3, 4, 5]]


def test_a_recogniser_on_onnx_runtime_gets_batches_where_its_file_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.models import onnx as on_onnx

    real, on_gpu = on_onnx.load, {"runtime": {"face_embedder": "onnxruntime"}}
    monkeypatch.setattr(on_onnx, "load", lambda path, task, device: real(path, task, "cpu"))
    faces = np.stack(pictures(19, 112))
    for faces_in_file, flat, size in ((1, 1, 1), ("n", 0, 16), ("n", 1, 1)):
        folder = tmp_path / f"{faces_in_file}{flat}"
        folder.mkdir()
        recogniser(folder / "rec_toy.onnx", faces_in_file, flat)
        expected = ArcFace(ModelSettings(pack=str(folder)), "cpu").embed(faces)
        found = ArcFace(ModelSettings(pack=str(folder), **on_gpu), "cuda")
        assert found._size == size
        np.testing.assert_allclose(found.embed(faces), expected, rtol=1e-4, atol=1e-4)


def test_overlaps_are_resolved_as_insightface_does() -> None:
    from insightface.model_zoo.scrfd import SCRFD

    theirs = SCRFD.__new__(SCRFD)
    theirs.nms_thresh = 0.4
    for count in (0, 1, 40, 300):
        corners = RNG.uniform(0, 200, (count, 2)).astype(np.float32)
        boxes = np.hstack((corners, corners + RNG.uniform(1, 90, (count, 2)).astype(np.float32)))
        scores = np.sort(RNG.uniform(0, 1, count).astype(np.float32))[::-1]
        assert without_overlaps(boxes) == theirs.nms(np.hstack((boxes, scores[:, None])))


# --- with the real pack


def read(data: Path, row: dict[str, str]) -> Image:
    pixels = cv2.imread(str(data / "photos" / row["file"]))
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)


@pytest.fixture(scope="module")
def photos(data: Path, labels: list[dict[str, str]]) -> list[Image]:
    """The labelled photos, RGB."""
    return [read(data, row) for row in labels]


@pytest.mark.real_data
@pytest.mark.long
@pytest.mark.parametrize("size", [4])
def test_the_real_detector_gives_the_same_boxes_in_batches_on_torch(size: int, data: Path, photos: list[Image]) -> None:
    pack = str(data / "models" / "real")
    expected = Scrfd(ModelSettings(pack=pack), "cpu").detect_all(photos)
    found = in_batches(ModelSettings(pack=pack, runtime=ON_TORCH), size).detect_all(photos)
    require_same(found, expected, 0.01)
    assert sum(int((faces.score >= 0.5).sum()) for faces in found) > 20
    for photo, faces in list(zip(photos, expected, strict=True))[:3]:
        require_same([Scrfd(ModelSettings(pack=pack), "cpu").detect(photo)], [faces], 0)


@pytest.mark.real_data
@pytest.mark.long
@pytest.mark.parametrize("file", ["real/det_2.5g.onnx", "extra/det_500m.onnx"])
def test_the_real_models_prove_themselves(data: Path, file: str) -> None:
    canvases = [_letterbox(photo, 640).canvas for photo in _proof_photos()]
    network = ScrfdTorch(data / "models" / file, "cpu", size=2)
    network.require_same(canvases, 0.2)
    assert all(found.scores.max() > 0.6 for found in network(canvases, 0.2)), "the proof needs a face"


@pytest.mark.real_data
def test_the_int8_recogniser_takes_batches_because_each_face_has_its_own_scale(
    data: Path, labels: list[dict[str, str]]
) -> None:
    pack = str(data / "models" / "real")
    photos = [read(data, row) for row in labels[:2]]
    faces = np.stack([cv2.resize(photo, (112, 112), interpolation=cv2.INTER_AREA) for photo in photos])
    on_onnx = ArcFace(ModelSettings(pack=pack), "cpu")
    expected = on_onnx.embed(faces)
    recogniser = ArcFaceTorch(data / "models" / "real" / "w600k_mbf_int8.onnx", "cpu", size=2)
    found, alone = recogniser.embed(faces), recogniser.embed(faces[1:2])
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > 0.98  # a last bit decides how a value is rounded, layer after layer
    np.testing.assert_allclose(found[1], alone[0], rtol=1e-3, atol=1e-3)
    recogniser.require_same(list(faces[:2]))
    assert not on_onnx._keeps_faces_apart(4), "there a batch has one scale"
