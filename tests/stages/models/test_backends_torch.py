"""Parsing and vision towers on torch: real loading code, real forward passes, no network, no pickled code."""

import hashlib
import json
import pickle
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.arrays import Image
from schemas.errors import PlanError, WeightsError
from stages.models.image_embedders.clip import ClipVitH
from stages.models.image_embedders.dinov2 import DinoV2
from stages.models.segmenters.facexlib import _TO_BISENET, FacexlibParser
from stages.models.torch_backend import prepare
from stages.settings import ModelSettings

RNG = np.random.default_rng(0)
KPS = np.zeros((5, 2), np.float32)
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14, "image_size": 224}

prepare("cpu")
torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object) -> None:
        raise AssertionError(f"tried to reach {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def photos(n: int, side: int = 224) -> Image:
    return RNG.integers(0, 256, (n, side, side, 3), np.uint8)


# --- CLIP and DINOv2


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP tower, saved as transformers saves it."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(**TINY, intermediate_size=64, projection_dim=24, hidden_act="gelu")
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(Dinov2Config(**TINY, mlp_ratio=2)).save_pretrained(folder)
    return folder


def test_clip_gives_projected_and_penultimate_features(clip: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    images = photos(2)
    found = ClipVitH(ModelSettings(paths={"clip-vit-h": str(clip)}), "cpu").embed(images)
    pixels = CLIPImageProcessor()(list(images), return_tensors="pt").pixel_values
    model = CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    with torch.no_grad():
        direct = model(pixels, output_hidden_states=True)
    assert len(direct.hidden_states) == TINY["num_hidden_layers"] + 1
    for column, expected in (("clip", direct.image_embeds), ("clip_hidden", direct.hidden_states[2])):
        assert found[column].dtype == np.float16
        np.testing.assert_allclose(found[column], expected.numpy(), rtol=2e-3, atol=2e-3)
    assert (found["clip"].shape, found["clip_hidden"].shape) == ((2, 24), (2, 257, 32))


def test_dinov2_gives_the_normed_last_hidden_state(dino: Path) -> None:
    from transformers import Dinov2Model

    images = photos(2)
    found = DinoV2(ModelSettings(paths={"dinov2": str(dino)}), "cpu").embed(images)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((torch.from_numpy(images).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dino).eval()(pixels).last_hidden_state
    assert set(found) == {"dino"}
    np.testing.assert_allclose(found["dino"], expected.numpy(), rtol=2e-3, atol=2e-3)


def test_features_do_not_depend_on_the_batch(clip: Path) -> None:
    tower, images = ClipVitH(ModelSettings(paths={"clip-vit-h": str(clip)}), "cpu"), photos(3)
    sizes = []
    tower._model.register_forward_pre_hook(
        lambda _, __, named: sizes.append(len(named["pixel_values"])), with_kwargs=True
    )
    together, alone = tower.embed(images), tower.embed(images[1:2])
    assert sizes == [1, 1, 1, 1], "a larger model's sums may depend on the batch, this tiny one's do not"
    for column in together:
        assert together[column][1].tobytes() == alone[column][0].tobytes()


def test_card_holds_the_sha256_of_the_weights(clip: Path) -> None:
    (card,) = ClipVitH.cards(ModelSettings(paths={"clip-vit-h": str(clip)}))
    assert card.sha256 == hashlib.sha256((clip / "model.safetensors").read_bytes()).hexdigest()
    assert (card.name, card.task, card.commercial) == ("clip-vit-h", "image_embedder", True)


def copied(clip: Path, to: Path, **config: Any) -> ModelSettings:
    (to / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes())
    (to / "config.json").write_text(json.dumps(json.loads((clip / "config.json").read_text()) | config))
    return ModelSettings(paths={"clip-vit-h": str(to)})


@pytest.mark.parametrize("config", [{"num_hidden_layers": 4}, {"hidden_size": 64}], ids=["missing", "mismatch"])
def test_incomplete_tower_is_refused(config: dict[str, int], clip: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="fetch it again"):
        ClipVitH(copied(clip, tmp_path, **config), "cpu")


def test_damaged_folders_are_one_sentence(clip: Path, tmp_path: Path) -> None:
    settings = copied(clip, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage" * 99)
    with pytest.raises(WeightsError, match="cannot be loaded as CLIPVisionModelWithProjection"):
        ClipVitH(settings, "cpu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be loaded"):
        ClipVitH(settings, "cpu")


def test_pickled_weights_are_not_taken(clip: Path, tmp_path: Path) -> None:
    settings = copied(clip, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"model\.safetensors does not exist"):
        ClipVitH(settings, "cpu")


def test_gpu_that_is_absent_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"executor\.gpus = 0"):
        prepare("cuda")


# --- facexlib


@pytest.fixture(scope="module")
def bisenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BiSeNet under a name that facexlib does not know."""
    from facexlib.parsing.bisenet import BiSeNet

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("parsing") / "mine.pth"
    torch.save(BiSeNet(num_class=19).state_dict(), path)
    return path


def test_bisenet_labels_as_facexlib_does(bisenet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from facexlib.parsing.bisenet import BiSeNet

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not stand in the way
    image = photos(1, 256)[0]
    found = FacexlibParser(ModelSettings(paths={"bisenet": str(bisenet)}), "cpu").segment(image, KPS)
    model = BiSeNet(num_class=19).eval()
    model.load_state_dict(torch.load(bisenet, weights_only=True))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((torch.from_numpy(image).float() / 255 - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = model(pixels)[0].argmax(1)[0].numpy()
    assert (found.dtype, found.shape) == (np.uint8, (256, 256))
    assert (found == expected).mean() > 0.999, "last bits of the pixels may differ"
    assert len(np.unique(found)) > 1


@pytest.mark.long
def test_parsenet_labels_as_facexlib_does(tmp_path: Path) -> None:
    from facexlib.parsing.parsenet import ParseNet

    torch.manual_seed(0)
    model = ParseNet(in_size=512, out_size=512, parsing_ch=19).eval()
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    image = photos(1, 128)[0]  # of any size, as the network is convolutional: at 512 it takes 5 s
    settings = ModelSettings(parser="parsenet", paths={"parsenet": str(tmp_path / "mine.pth")})
    found = FacexlibParser(settings, "cpu").segment(image, KPS)
    with torch.no_grad():
        pixels = torch.from_numpy(image).float().permute(2, 0, 1)[None] / 127.5 - 1
        expected = _TO_BISENET["parsenet"][model(pixels)[0].argmax(1)[0].numpy()]
    assert (found == expected).mean() > 0.999
    assert FacexlibParser.cards(settings)[0].name == "parsenet"


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("environment", ["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_pickled_code_is_never_run(environment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if environment:
        monkeypatch.setenv(environment, "1")
    torch.save({"weights": Bomb(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="holds no weights of facexlib's bisenet"):
        FacexlibParser(ModelSettings(paths={"bisenet": str(tmp_path / "evil.pth")}), "cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"garbage" * 99, pickle.dumps([1], protocol=2)], ids=["empty", "garbage", "list"]
)
def test_what_is_no_state_dict_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.pth").write_bytes(content)
    with pytest.raises(WeightsError, match="holds no weights"):
        FacexlibParser(ModelSettings(paths={"bisenet": str(tmp_path / "mine.pth")}), "cpu")


def test_missing_parser_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FACESHARDS_MODELS", raising=False)
    with pytest.raises(WeightsError, match="models fetch bisenet"):
        FacexlibParser(ModelSettings(), "cpu")
