"""Heads on image_embeds: what files may hold, which vectors they belong to, and the words that tell photos from art."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny_clip
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset.config import load_config
from pipeline.dataset.plan import Plan, make_plan
from schemas.columns import schema
from schemas.digest import sha256, sha256_of_file
from schemas.drops import DropReason
from schemas.errors import ConfigError, ExitCode, PlanError, WeightsError
from stages.base import DROP
from stages.embed_image import EmbedImage
from stages.models.heads import heads_of, read_head
from stages.models.image_embedders.clip import ClipVitH
from stages.models.papers import WEIGHTS, WeightFile
from stages.models.photo_or_art import CLASSES, photo_head
from stages.models.torch_backend import prepare
from stages.pixels.images import encode_jpeg, encode_png
from stages.runtime import Runtime
from stages.settings import ModelSettings, Settings

prepare("cpu")
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`models.paths` of a tiny CLIP."""
    images, whole = tiny_clip.write(tmp_path_factory.mktemp("clip"))
    return {"clip-vit-h": str(images), "clip-vit-h-text": str(whole)}


def copied(tiny: dict[str, str], folder: Path) -> dict[str, str]:
    images = shutil.copytree(tiny["clip-vit-h"], folder / "images")
    return {**tiny, "clip-vit-h": str(images)}


@pytest.fixture
def clip(tiny: dict[str, str], tmp_path: Path) -> dict[str, str]:
    return copied(tiny, tmp_path)


def make_photo_head(settings: ModelSettings) -> Path:
    path, content = photo_head(settings)
    path.write_bytes(content)
    return path


def sets(paths: dict[str, str], *more: str) -> list[str]:
    pairs = [f"models.paths.{name}={path}" for name, path in paths.items()]
    return [word for pair in (*pairs, "models.image_embedder=clip-vit-h", *more) for word in ("--set", pair)]


def test_a_photo_is_what_clip_itself_takes_for_one(clip: dict[str, str]) -> None:
    import transformers

    made = make_photo_head(ModelSettings(paths=clip))
    first = made.read_bytes()
    assert make_photo_head(ModelSettings(paths=clip)).read_bytes() == first, "the same file wherever it is made"
    head = heads_of(Settings(models=ModelSettings(paths=clip)))["photo"]
    model = transformers.CLIPModel.from_pretrained(clip["clip-vit-h-text"]).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip["clip-vit-h-text"])
    pixels = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 3, 224, 224)).astype(np.float32))
    with torch.inference_mode():
        logits = []
        for words in CLASSES:
            tokens = tokenizer(list(words), return_tensors="pt", padding=True)
            out = model(**tokens, pixel_values=pixels)
            mean = torch.nn.functional.normalize(out.text_embeds.mean(dim=0), dim=0)
            logits.append(model.logit_scale.exp() * out.image_embeds @ mean)
        expected = torch.stack(logits).softmax(dim=0)[0].numpy()
        embeds = model.vision_model(pixels).pooler_output @ model.visual_projection.weight.T
    assert 0 < expected.min() < expected.max() < 1
    np.testing.assert_allclose(head(embeds.numpy().astype(np.float16)), expected, atol=0.02)
    assert head.metadata["licence"] == "MIT"


@pytest.fixture
def shop(tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serves the tiny CLIP as the hub serves the real one, to an empty cache; what was downloaded."""
    fetched: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            fetched.append(str(args[0]).split()[1])

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FACESHARDS_MODELS", raising=False)
    root = Path(tiny["clip-vit-h"]).parent
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=root)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for attribute, name in (("papers", "clip-vit-h"), ("text", "clip-vit-h-text")):
            folder = Path(tiny[name])
            url = f"http://127.0.0.1:{server.server_port}/{folder.name}"
            files = tuple(
                WeightFile(file.name, file.task, 9, sha256_of_file(folder / file.name), source=f"{url}/{file.name}")
                for file in WEIGHTS[name].files
            )
            weight = replace(WEIGHTS[name], files=files, repository="")
            monkeypatch.setitem(WEIGHTS, name, weight)
            monkeypatch.setattr(ClipVitH, attribute, weight)
        yield fetched
        server.shutdown()


def models(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["models", *words])
    assert result.exit_code == code, result.output
    return result.output


def test_fetching_photo_gets_what_its_words_need_makes_them_and_tidies_up(shop: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "cache/faceshards/models"
    head, whole = folder / "clip-vit-h/photo.safetensors", folder / "clip-vit-h-text"
    cheap = ["models.detector=haar", "models.segmenter=grabcut", "models.face_embedder=lbp"]
    cheap += ["models.image_embedder=clip-vit-h", "filter.photo=0.5"]
    sets = [word for pair in cheap for word in ("--set", pair)]
    assert json.loads(models("list", "--json", *sets))["missing"] == ["clip-vit-h", "photo"]
    listed = json.loads(models("list", "--json", "photo"))
    assert (listed["missing"], listed["bytes_missing"], listed["models"][0]["target"]) == (["photo"], 63, str(head))
    assert f"made by `python -m pipeline models fetch photo` of clip-vit-h-text\n    to {head}\n" in models("list")
    assert "photo: NOT USABLE as photo: photo is missing" in models("check", "photo", code=2)

    assert models("fetch", "photo") == f"photo: {head}\n"
    assert (len(shop), whole.exists(), sorted(path.name for path in folder.iterdir())) == (
        9,
        False,
        [".lock", "clip-vit-h"],
    )
    first = head.read_bytes()
    assert "photo: verified; " in models("check", "photo")
    models("fetch", *sets)
    assert len(shop) == 9, "what is there is not made again"
    assert make_plan(load_config(None, cheap, shards="sample")).model_list[-1]["name"] == "photo.safetensors"

    head.write_bytes(
        first.replace(b'"MIT"', b'"xyz"').replace(sha256_of_file(head.parent / "model.safetensors").encode(), b"0" * 64)
    )
    assert "photo is wrong: " in models("check", "photo", code=2)
    models("fetch", "clip-vit-h-text", "photo")
    assert (head.read_bytes(), whole.is_dir()) == (first, True)


def test_words_and_pictures_must_be_of_one_model(clip: dict[str, str], tmp_path: Path) -> None:
    tower = Path(clip["clip-vit-h"]) / "model.safetensors"
    tensors = load_file(tower)
    make_photo_head(ModelSettings(paths=clip))
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"][::-1].copy()
    save_file(tensors, tower)
    with pytest.raises(WeightsError, match="is not the model that"):
        make_photo_head(ModelSettings(paths=clip))
    with pytest.raises(WeightsError, match=r"photo\.safetensors was made for other weights"):
        make_plan(load_config(None, sets(clip)[1::2], shards="sample"))
    (tower.parent / "photo.safetensors").unlink()
    assert not heads_of(Settings(models=ModelSettings(paths=clip)))


def test_photo_is_measured_and_may_be_judged_once_its_words_were_made(clip: dict[str, str]) -> None:
    def planned(*more: str) -> Plan:
        return make_plan(load_config(None, [*sets(clip)[1::2], *more], shards="sample"))

    usual = planned()
    with pytest.raises(PlanError, match=r"nothing measures `photo`: .* `python -m pipeline models fetch photo` makes"):
        planned("filter.photo=0.5")
    made = CliRunner().invoke(app, ["models", "fetch", "photo", *sets(clip)])
    assert (made.exit_code, Path(clip["clip-vit-h"], "photo.safetensors").is_file()) == (ExitCode.OK, True), made.output
    plan = planned("filter.photo=0.5")
    assert [one for one in plan.model_list if one not in usual.model_list] == plan.model_list[-1:]
    assert (plan.model_list[-1]["task"], plan.model_list[-1]["licence"]) == ("photo", "MIT")
    assert planned("models.heads.photo=").digest == usual.digest != planned().digest


def test_heads_of_another_embedder_or_width_are_refused(clip: dict[str, str], tmp_path: Path) -> None:
    save_file({"weight": np.ones((1, 768), np.float32)}, tmp_path / "wide")
    pairs = [*sets(clip)[1::2], f"models.heads.aesthetic={tmp_path / 'wide'}"]
    with pytest.raises(WeightsError, match="reads vectors of 768 numbers, but those of clip-vit-h have 24"):
        make_plan(load_config(None, pairs, shards="sample"))
    with pytest.raises(ConfigError, match=r"set models\.image_embedder = clip-vit-h"):
        make_plan(load_config(None, [pairs[-1]], shards="sample"))


def test_a_sequential_of_torch_computes_what_it_does_there(tmp_path: Path) -> None:
    torch.manual_seed(0)
    linear, relu, dropout = torch.nn.Linear, torch.nn.ReLU, torch.nn.Dropout
    vectors = np.random.default_rng(0).normal(size=(9, 16)).astype(np.float16)
    unit = torch.nn.functional.normalize(torch.from_numpy(vectors).float(), dim=1)
    for activation, middle in (
        ("relu", [relu(), dropout(), linear(8, 8), linear(8, 1)]),
        ("none", [dropout(), linear(8, 1)]),
    ):
        layers = torch.nn.Sequential(linear(16, 8), *middle).eval()
        state = {f"layers.{name}": value.numpy() for name, value in layers.state_dict().items()}
        for output, last in (("sigmoid", torch.sigmoid), ("none", torch.nn.Identity())):
            save_file(state, tmp_path / "head", {"activation": activation, "output": output})
            expected = last(layers(unit)).detach().numpy()[:, 0]
            np.testing.assert_allclose(read_head(tmp_path / "head")(vectors), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"weight": np.ones((2, 4))}, {}),
        ({"weight": np.ones(4)}, {}),
        ({"weight": np.ones((1, 4)), "bias": np.ones(2)}, {}),
        ({"weight": np.ones((1, 4)), "scale": np.ones(1)}, {}),
        ({"0.weight": np.ones((2, 4)), "1.weight": np.ones((1, 3))}, {}),
        ({"weight": np.ones((1, 4))}, {"activation": "gelu"}),
        ({"weight": np.ones((1, 4))}, {"output": "tanh"}),
        ({"weight": np.full((1, 4), np.nan)}, {}),
    ],
)
def test_what_is_no_head_is_one_sentence(tensors: Any, metadata: Any, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "head", metadata)
    with pytest.raises(WeightsError, match=r"is no head: models\.heads need linear layers of finite numbers"):
        read_head(tmp_path / "head")


def test_files_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"junk" * 9)
    for name in ("junk", "missing"):
        with pytest.raises(WeightsError, match=f"{name} cannot be read as a safetensors file"):
            read_head(tmp_path / name)


def rows(photos: list[np.ndarray]) -> pa.Table:
    """Photos whose faces, without a mask that matters, are their upper left corner."""
    files = [encode_png(photo) for photo in photos]
    known = {
        "face": [encode_jpeg(np.ascontiguousarray(photo[:224, :224]), 100) for photo in photos],
        "mask": [encode_png(np.ones((224, 224), np.uint8))] * len(photos),
        "image": files,
        "sha256": [sha256(file) for file in files],
    }
    return pa.table(known, schema=schema(EmbedImage.reads))


class Planted:
    """Gives pictures the vectors that it was given for their first grey level; notes what it looks at."""

    def __init__(self, vectors: dict[int, np.ndarray]) -> None:
        self.vectors, self.seen = vectors, []

    def embed(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.seen.append(images)
        return {"clip": np.stack([self.vectors[int(image[0, 0, 0])] for image in images]).astype(np.float16)}


@pytest.fixture(scope="module")
def measured(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Model settings with the words of `photo`, and two heads that give a number of a vector."""
    folder = tmp_path_factory.mktemp("heads")
    models: dict[str, Any] = {"image_embedder": "clip-vit-h", "paths": copied(tiny, folder)}
    make_photo_head(ModelSettings(paths=models["paths"]))
    for name, axis, output in (("aesthetic", 0, "none"), ("nsfw", 1, "sigmoid")):
        save_file({"weight": 8 * np.eye(24, dtype=np.float32)[axis : axis + 1]}, folder / name, {"output": output})
    return {**models, "heads": {name: str(folder / name) for name in ("aesthetic", "nsfw")}}


def judged(measured: dict[str, Any], vectors: list[np.ndarray], **limits: float) -> list[tuple[Any, ...]]:
    """The columns of heads and the drops of faces that are embedded as planted."""
    settings = Settings.model_validate({"models": measured, "filter": limits, "segment": {"condition": "plain"}})
    heads = tuple((name, head.sha256) for name, head in heads_of(settings).items())
    stage = EmbedImage(settings, Runtime(heads=heads))
    levels = np.linspace(0, 255, len(vectors)).astype(int).tolist()
    stage._embedder = Planted(dict(zip(levels, vectors, strict=True)))
    result = stage(rows([np.full((224, 224, 3), level, np.uint8) for level in levels]))
    return list(zip(*(result[name].to_pylist() for name in ("photo", "aesthetic", "nsfw_score", DROP)), strict=True))


def words(measured: dict[str, Any]) -> np.ndarray:
    """The text vectors of the classes, of unit length, photos first."""
    (weight, _, _), *others = heads_of(Settings.model_validate({"models": measured}))["photo"].layers
    assert not others
    return weight / np.linalg.norm(weight, axis=1, keepdims=True)


def test_drops_not_a_photo(measured: dict[str, Any]) -> None:
    texts, rng = words(measured), np.random.default_rng(0)
    near = [20 * (text + 0.02 * rng.normal(size=24)) for text in texts]
    for limit, reason in ((0, None), (0.5, DropReason.NOT_A_PHOTO)):
        photo, *art = judged(measured, near, photo=limit)
        assert photo[0] > 0.95
        assert photo[-1] is None
        assert len(art) == 7
        assert all(one[0] < 0.05 and one[-1] == reason for one in art)


def unit(*numbers: float) -> np.ndarray:
    vector = np.zeros(24)
    vector[: len(numbers)] = numbers
    vector[-1] = np.sqrt(1 - np.square(numbers).sum())
    return 7 * vector


def test_drops_low_aesthetic(measured: dict[str, Any]) -> None:
    found = judged(measured, [unit(0.5), unit(0.75)], min_aesthetic=5)
    assert [one[1] for one in found] == pytest.approx([4, 6], rel=1e-2)
    assert [one[-1] for one in found] == [DropReason.LOW_AESTHETIC, None]


def test_drops_nsfw(measured: dict[str, Any]) -> None:
    found = judged(measured, [unit(0, 0.5), unit(0, -0.5)], max_nsfw=0.5)
    assert [one[2] for one in found] == pytest.approx([1 / (1 + np.exp(-4)), 1 / (1 + np.exp(4))], rel=1e-2)
    assert [one[-1] for one in found] == [DropReason.NSFW, None]


def test_scores_of_photos_look_at_the_middle_of_the_whole_photo(measured: dict[str, Any]) -> None:
    settings = Settings.model_validate({"models": measured})
    heads = tuple((name, head.sha256) for name, head in heads_of(settings).items())
    stage = EmbedImage(settings, Runtime(heads=heads))
    stage._embedder = planted = Planted({50: unit(0.25), 255: unit(0.5)})
    photo = np.full((600, 1000, 3), 50, np.uint8)
    photo[:, 300:700] = 60
    photo[:, :190] = photo[:, 810:] = 255
    result = stage(rows([photo]))
    assert result["aesthetic"][0].as_py() == pytest.approx(2, rel=1e-2)
    whole = planted.seen[-1][0]
    assert (whole.shape, int(whole.max())) == ((224, 224, 3), 60)


def test_heads_of_the_plan_must_be_those_of_this_machine(measured: dict[str, Any]) -> None:
    settings = Settings.model_validate({"models": {**measured, "heads": {}}})
    with pytest.raises(WeightsError, match=r"heads of this run \(photo\) are not on this machine"):
        EmbedImage(settings, Runtime(heads=(("photo", "0" * 64),)))
