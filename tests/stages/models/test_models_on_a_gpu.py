"""What is written for a GPU, on a pretended one: graphs, batches that threads share, and who may touch the device."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import fake_dataset as fake
import numpy as np
import pyarrow as pa
import pytest
import tiny_captioners
import torch
from pretended_gpu import pretended_gpu
from tiny_packs import detector, pictures, recogniser

from pipeline.dataset.config import load_config
from pipeline.dataset.plan import make_plan
from pipeline.shared.bases import find_base
from schemas.columns import schema
from schemas.shard import decode_npy
from stages.caption.transformers_model import Folder
from stages.encode import Encode
from stages.models import encoders, torch_backend
from stages.models.detectors import scrfd_torch
from stages.models.detectors.scrfd import Scrfd
from stages.models.face_embedders import arcface_torch
from stages.models.face_embedders.arcface import ArcFace
from stages.models.image_embedders.clip import ClipVitH
from stages.models.segmenters.facexlib import label_batches
from stages.models.torch_backend import CLIP, DEVICE, Batches
from stages.pixels.nvjpeg import NvJpeg
from stages.runtime import EncoderSource, Runtime
from stages.settings import ModelSettings


@pytest.fixture
def gpu(monkeypatch):
    with pretended_gpu(monkeypatch) as gpu:
        yield gpu


def test_a_graph_computes_anew_what_it_was_captured_with(gpu) -> None:
    batches = Batches(lambda images: (images.float().mean((1, 2, 3)), images[:, 0, 0].half() + 1), 3, "cuda")
    images = [np.full((4, 4, 3), value, np.uint8) for value in range(7)]
    for _ in range(2):
        found = batches(images)
        assert [float(mean) for mean, _ in found] == [0, 1, 2, 3, 4, 5, 6]
        assert [pixel.tolist() for _, pixel in found] == [[value + 1.0] * 3 for value in range(7)]
    with pytest.raises(AssertionError, match="while a CUDA graph is captured"):
        Batches(lambda images: (images[images.amax((1, 2, 3)) > 3],), 3, "cuda")(images)


def test_large_pictures_and_ever_new_shapes_take_no_more_memory(gpu, monkeypatch) -> None:
    monkeypatch.setattr(torch_backend, "_FULL_PX", 16 * 16)
    monkeypatch.setattr(torch_backend, "_MOST_SHAPES", 3)
    sizes = []

    def compute(images):
        sizes.append(tuple(images.shape[:3]))
        return (images.float().amax((1, 2, 3)),)

    batches = Batches(compute, 8, "cuda")
    for height, width in ((16, 16), (16, 32), (64, 64), (4, 4), (16, 32), (8, 8)):
        images = [np.full((height, width, 3), value, np.uint8) for value in range(10)]
        assert [float(most) for (most,) in batches(images)] == list(range(10))
    assert dict.fromkeys(sizes) == dict.fromkeys([(8, 16, 16), (4, 16, 32), (1, 64, 64), (8, 4, 4), (8, 8, 8)])
    assert [shape[:2] for shape in batches._of_shape] == [(4, 4), (16, 32), (8, 8)]


def test_a_pack_is_proved_and_shared_by_threads(gpu, tmp_path, monkeypatch) -> None:
    for module in (scrfd_torch, arcface_torch):
        monkeypatch.setattr(module, "_GPU_BATCH", 2)  # a CPU is slow in float16
    detector(tmp_path / "det_toy.onnx")
    recogniser(tmp_path / "rec_toy.onnx")
    settings = ModelSettings(pack=str(tmp_path), det_size=128)
    photos = [cv2.resize(photo, size) for photo, size in zip(pictures(3, 64), [(90, 200), (300, 120), (256, 256)])]  # noqa: B905
    faces = np.stack(pictures(5, 112))
    expected = Scrfd(settings, "cpu").detect_all(photos), ArcFace(settings, "cpu").embed(faces)
    detect, embed = Scrfd(settings, "cuda"), ArcFace(settings, "cuda")
    screen = Scrfd.screen(settings, "cuda")
    gpu.lock = DEVICE

    def all_of_it(_):
        with gpu.modes():
            return detect.detect_all(photos), embed.embed(faces), screen(photos)

    with ThreadPoolExecutor(2) as pool:
        for found, vectors, looks in pool.map(all_of_it, range(2)):
            for ours, theirs in zip(found, expected[0], strict=True):
                assert abs(float(ours.score.max()) - float(theirs.score.max())) < 0.02
            np.testing.assert_allclose(vectors, expected[1], atol=0.05 * np.abs(expected[1]).max())
            assert len(looks) == 3


def test_towers_parsers_and_jpegs(gpu) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    tower = ClipVitH.__new__(ClipVitH)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=24, patch_size=14)).eval()
    tower._device, tower._model = "cuda", model.half().to("cuda")
    tower._batches = tower.batches("cuda", 2)
    unpack = torch.nn.Unflatten(0, (1, -1))  # its labels are the first of several outputs
    parse = label_batches(torch.nn.Sequential(torch.nn.Conv2d(3, 19, 3), unpack), CLIP, "cuda")
    gpu.lock = DEVICE
    tower._require_batches_equal_singles()
    assert tower.embed(np.zeros((3, 224, 224, 3), np.uint8))["clip_hidden"].shape == (3, 257, 32)
    assert len(parse([np.zeros((8, 8, 3), np.uint8)] * 3)) == 3

    def decoded(files):
        pixels = (cv2.cvtColor(cv2.imdecode(file.numpy(), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB) for file in files)
        return [gpu.mark(torch.from_numpy(each).permute(2, 0, 1)) for each in pixels]

    picture = cv2.imencode(".jpg", np.full((16, 24, 3), 90, np.uint8))[1].tobytes()
    assert NvJpeg(decoded)(picture).shape == (16, 24, 3)


@pytest.mark.parametrize("kind", ["git", pytest.param("llava", marks=pytest.mark.long)])
def test_captions_are_made_by_who_holds_the_device(kind, gpu, tmp_path) -> None:
    settings = load_config(None, [f"models.captioner={tiny_captioners.write(tmp_path, kind)}", "caption.max_tokens=3"])
    captioner = Folder(settings, "cuda")
    gpu.lock = DEVICE
    assert len(captioner.caption([np.zeros((32, 32, 3), np.uint8)] * 3)) == 3


@pytest.mark.long
@pytest.mark.parametrize("base", ["tiny", "tiny-sdxl"])
def test_latents_and_texts_of_many_rows_go_together_by_who_holds_the_device(gpu, base, monkeypatch) -> None:
    monkeypatch.setattr(encoders, "_GPU_CAPTIONS", 4)
    config = load_config(
        None, ["encode.latents=true", "encode.text=true", f"encode.base={base}", "encode.resolution=64"]
    )
    source = make_plan(config, dry_run=True).runtime.encoders
    rows = [fake.record("a", row, **fake.pictures(row % 4)) for row in range(6)]  # more than a batch
    for i, row in enumerate(rows):
        row["text"] = None if i == 3 else "word " * i
        if i % 3 == 0:
            row["full"] = None
    table = pa.Table.from_pylist(rows, schema=schema(Encode.reads))
    expected = Encode(config, Runtime("cpu", source))(table)
    encode = Encode(config, Runtime("cuda", source))
    captions = []
    batches = encode._text._batches
    batches._compute, compute = lambda tokens: (captions.append(len(tokens)), compute(tokens))[1], batches._compute
    gpu.lock = DEVICE

    def all_of_it(_):
        with gpu.modes():
            return encode(table)

    with ThreadPoolExecutor(2) as pool:
        for columns in pool.map(all_of_it, range(2)):
            assert columns["targets"].equals(expected["targets"])
            for name in set(Encode.writes) - {"targets"}:
                assert columns[name].is_null().equals(expected[name].is_null()), name
                for one, other in zip(columns[name].drop_null(), expected[name].drop_null(), strict=True):
                    one, other = (decode_npy(each.as_py()).astype(np.float32) for each in (one, other))
                    np.testing.assert_allclose(one, other, atol=0.05)
    assert set(captions) == {4}


@pytest.mark.parametrize(
    ("base", "overflows", "dtype"),
    [
        ("tiny", True, "float16"),
        ("tiny-sdxl", True, "float32"),
        pytest.param("tiny-sdxl", False, "float16", marks=pytest.mark.long),
    ],
)
def test_a_vae_is_in_half_precision_where_it_does_not_overflow(
    gpu, base, overflows, dtype, tmp_path, monkeypatch
) -> None:
    folder = Path(shutil.copytree(find_base(base).folder, tmp_path / "base"))
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps({**config, "force_upcast": overflows}))
    dtypes = []
    put_on = encoders.on_device
    monkeypatch.setattr(encoders, "on_device", lambda *given: (dtypes.append(str(given[2])), put_on(*given))[1])
    vae = encoders.Vae(EncoderSource("base", str(folder), find_base(base).kind, "", ""), "cuda")
    gpu.lock = DEVICE
    (latents,) = vae.encode([np.full((64, 64, 3), 90, np.uint8)])
    assert dtypes == [f"torch.{dtype}"]
    assert np.isfinite(latents).all()
