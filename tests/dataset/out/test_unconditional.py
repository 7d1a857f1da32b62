"""The features of "no face": what they are, when they are written, and that damage is found."""

import json
import shutil
import time
from pathlib import Path

import fake_dataset as fake
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file, save_file
from sample_runs import no_report

from pipeline.dataset.config import load_config
from pipeline.dataset.finished.verify import verify
from pipeline.dataset.job import Job, make_dataset
from pipeline.dataset.out.unconditional import write_unconditional
from pipeline.dataset.plan import make_plan
from schemas.errors import ExitCode, OutputError
from schemas.shard import UNCONDITIONAL
from stages.models.backends import backend
from stages.models.torch_backend import prepare
from stages.settings import ModelSettings

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14, "image_size": 224}


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A tiny random tower of each kind, by registry name."""
    prepare("cpu")
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("towers")
    clip = CLIPVisionConfig(**TINY, intermediate_size=64, projection_dim=24, hidden_act="gelu")
    CLIPVisionModelWithProjection(clip).save_pretrained(folder / "clip-vit-h")
    Dinov2Model(Dinov2Config(**TINY, mlp_ratio=2)).save_pretrained(folder / "dinov2")
    return folder


def towered(tower: Path, name: str) -> list[str]:
    return [f"models.image_embedder={name}", f"models.paths.{name}={tower / name}"]


@pytest.mark.parametrize(
    ("name", "column"), [("clip-vit-h", "clip_hidden"), pytest.param("dinov2", "dino", marks=pytest.mark.long)]
)
def test_a_tower_is_given_zeros_behind_its_preprocessing(tower, name, column):
    import transformers

    settings = ModelSettings(paths={name: str(tower / name)})
    found = backend("image_embedder", name)(settings, "cpu").unconditional()
    cls = {"clip-vit-h": "CLIPVisionModelWithProjection", "dinov2": "Dinov2Model"}[name]
    model = getattr(transformers, cls).from_pretrained(tower / name).eval()
    with torch.no_grad():
        direct = model(pixel_values=torch.zeros(1, 3, 224, 224), output_hidden_states=True)
    expected = direct.hidden_states[-2] if column == "clip_hidden" else direct.last_hidden_state
    assert list(found) == [column]
    assert (found[column].shape, found[column].dtype) == ((257, 32), np.float16)
    np.testing.assert_allclose(found[column], expected[0].numpy(), rtol=2e-3, atol=2e-3)


def test_patches_take_plain_mid_grey_for_no_face_in_milliseconds():
    patches = backend("image_embedder", "patches")(ModelSettings(), "cpu")
    start = time.perf_counter()
    found = patches.unconditional()
    assert time.perf_counter() - start < 1
    assert (list(found), found["clip_hidden"].shape, found["clip_hidden"].dtype) == (["clip_hidden"], (257, 1280), "f2")
    grey = patches.embed(np.full((1, 224, 224, 3), 128, np.uint8))["clip_hidden"][0]
    black = patches.embed(np.zeros((1, 224, 224, 3), np.uint8))["clip_hidden"][0]
    assert (found["clip_hidden"] == grey).all()
    assert np.linalg.norm(grey.astype(np.float64)) < np.linalg.norm(black.astype(np.float64))


def plan_of(*pairs: str):
    return make_plan(load_config(None, list(pairs), shards="sample"))


def test_equal_plans_give_equal_bytes_and_another_embedder_other_ones(tower, tmp_path):
    entries = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        entries.append(write_unconditional(tmp_path / name, fake.plan()))
    assert entries[0] == entries[1]
    assert (tmp_path / "a" / UNCONDITIONAL).read_bytes() == (tmp_path / "b" / UNCONDITIONAL).read_bytes()
    other = write_unconditional(tmp_path / "a", plan_of(*towered(tower, "dinov2")))
    assert other != entries[0]
    assert list(load_file(tmp_path / "a" / UNCONDITIONAL)) == ["dino"]


@pytest.mark.parametrize("damage", [b"", b"junk", "flipped", "folderless"])
def test_what_is_there_and_whole_is_left_and_damage_is_made_good(tmp_path, damage):
    path = tmp_path / UNCONDITIONAL
    entry = write_unconditional(tmp_path, fake.plan())
    good, stamp = path.read_bytes(), path.stat().st_mtime_ns
    assert write_unconditional(tmp_path, fake.plan()) == entry
    assert path.stat().st_mtime_ns == stamp
    if damage == "flipped":
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "folderless":
        save_file(load_file(path), path)  # the same tensors, but nothing says what made them
    else:
        path.write_bytes(damage)
    assert write_unconditional(tmp_path, fake.plan()) == entry
    assert path.read_bytes() == good
    assert [place.name for place in tmp_path.iterdir()] == [UNCONDITIONAL]


def test_a_folder_of_its_name_is_one_sentence(tmp_path):
    (tmp_path / UNCONDITIONAL).mkdir()
    with pytest.raises(OutputError, match=r"unconditional\.safetensors cannot be written: Is a directory"):
        write_unconditional(tmp_path, fake.plan())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A dataset as a release without the file left it."""
    return fake.write(tmp_path_factory.mktemp("finished"), {"a-00000": fake.mixed("a")})


@pytest.fixture
def out(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "out"))


def rerun(out: Path) -> None:
    with no_report():
        assert make_dataset(Job(fake.plan(), ()), out, Console(quiet=True)) is ExitCode.OK


def named(out: Path) -> dict[str, object]:
    return json.loads((out / "dataset.json").read_text())["files"]


def test_a_rerun_over_a_finished_dataset_adds_the_file_and_changes_no_shard(out):
    assert verify(out) == []
    before = {path: path.read_bytes() for path in (out / "shards").iterdir()}
    rerun(out)
    assert {path: path.read_bytes() for path in (out / "shards").iterdir()} == before
    told = named(out)
    assert list(told) == [UNCONDITIONAL]
    assert told[UNCONDITIONAL]["bytes"] == (out / UNCONDITIONAL).stat().st_size
    assert verify(out) == []
    (out / UNCONDITIONAL).unlink()
    rerun(out)
    assert named(out) == told


def test_nothing_kept_needs_no_file(tmp_path):
    out = fake.write(tmp_path / "out", {"a-00000": [fake.dead("a", 0, "metadata", "unsafe")]})
    rerun(out)
    assert named(out) == {}
    assert not (out / UNCONDITIONAL).exists()
    assert verify(out) == []


def problems_of(out: Path) -> list[tuple[str, str]]:
    return [(problem.file, problem.message) for problem in verify(out)]


def test_verify_finds_a_lost_a_longer_and_a_changed_file(out):
    rerun(out)
    path = out / UNCONDITIONAL
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert problems_of(out) == [(UNCONDITIONAL, "its sha256 is not the one in dataset.json")]
    path.write_bytes(good + b"x")
    assert [file for file, _ in problems_of(out)] == [UNCONDITIONAL] * 2
    path.unlink()
    assert "cannot be read" in problems_of(out)[0][1]


def republished(out: Path, data: bytes) -> list[tuple[str, str]]:
    """As a faulty writer would publish `data`."""
    from pipeline.dataset.out.output import fingerprint

    (out / UNCONDITIONAL).write_bytes(data)
    content = json.loads((out / "dataset.json").read_text())
    content["files"] = {UNCONDITIONAL: fingerprint(out / UNCONDITIONAL)}
    (out / "dataset.json").write_text(as_written(content))
    return problems_of(out)


def as_written(content: dict) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


HIDDEN = np.zeros((257, 1280), np.float16)


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"clip_hidden": HIDDEN[1:]}, "(256, 1280)"),
        ({"clip_hidden": HIDDEN.astype(np.float32)}, "float32"),
        ({"clip_hidden": HIDDEN.reshape(-1)}, "(328960,)"),
        ({"clip_hidden": HIDDEN + np.float16(np.nan)}, "not finite"),
        ({"arcface": HIDDEN}, "arcface"),
        ({"clip_hidden": HIDDEN, "dino": HIDDEN}, "dino"),
        ({}, "[]"),
    ],
)
def test_verify_looks_inside(out, arrays, named):
    from safetensors.numpy import save

    rerun(out)
    ((file, message),) = republished(out, save(arrays))
    assert file == UNCONDITIONAL
    assert named in message


def test_verify_never_raises_on_what_dataset_json_names(out):
    rerun(out)
    ((file, message),) = republished(out, b"no tensors")
    assert (file, message[:14]) == (UNCONDITIONAL, "cannot be read")
    path = out / "dataset.json"
    content = json.loads(path.read_text())
    for files, expected in [
        ([], "files is not an object"),
        ({UNCONDITIONAL: 1}, "files is not an object"),
        ({"../x": {}}, "which no dataset has"),
    ]:
        path.write_text(as_written({**content, "files": files}))
        ((file, message),) = problems_of(out)
        assert file == "dataset.json"
        assert expected in message
