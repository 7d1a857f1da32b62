"""SSCD by a weight file, against the published way of computing it."""

from zipfile import ZipFile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms
from torchvision.models.resnet import Bottleneck, ResNet

from schemas.errors import WeightsError
from stages.models.sscd import Sscd


def small(num_classes: int) -> ResNet:
    """Of the layout of a ResNet-50, with a third of its blocks."""
    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=num_classes)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(torchvision.models, "resnet50", small)


def test_a_photo_is_described_as_published(tmp_path):
    torch.manual_seed(0)
    resnet = small(512).eval()
    path = tmp_path / "sscd_disc_mixup.torchvision.pt"
    torch.save({f"backbone.{name}": one for name, one in resnet.state_dict().items()}, path)
    model = Sscd(path)
    assert model.stamp["name"] == "sscd_disc_mixup.torchvision"
    photo = np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8).repeat(10, 0).repeat(10, 1)
    small_288 = transforms.Compose(
        [
            transforms.Resize(288),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )

    def pooled(module, given, activations):
        return given[0].flatten(2).clamp(min=1e-6).pow(3.0).mean(dim=2).pow(1 / 3.0)

    resnet.avgpool.register_forward_hook(pooled)
    with torch.inference_mode():
        wanted = torch.nn.functional.normalize(resnet(small_288(Image.fromarray(photo))[None]))[0].numpy()
    described = model(photo)
    assert described.shape == (512,)
    assert np.allclose(described, wanted, atol=1e-5)
    assert not np.allclose(described, model(photo[:, ::-1]), atol=1e-3)


def test_another_file_is_refused_in_a_sentence(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other")
    (tmp_path / "text").write_bytes(b"no")
    (tmp_path / "empty").write_bytes(b"")
    with ZipFile(tmp_path / "script", "w") as script:
        for name in ("data.pkl", "constants.pkl", "version", "code/x.py"):
            script.writestr(f"script/{name}", b"3\n")
    wrong = dict.fromkeys(("other", "text", "empty", "script"), "holds code") | dict.fromkeys(
        ("absent", "."), "be read"
    )
    for name, words in wrong.items():
        with pytest.raises(WeightsError, match=words) as caught:
            Sscd(tmp_path / name)
        assert "\n" not in str(caught.value)
