"""What is proved of a model before it is used: the device it runs on, and that a batch does not mix its images."""

import numpy as np
import pytest

from schemas.errors import PlanError
from stages.models.backends import backend
from stages.models.papers import WEIGHTS
from stages.models.segmenters.facexlib import FacexlibParser
from stages.models.tower import Tower
from stages.settings import ModelSettings

CPU, GPU = "CPUExecutionProvider", "CUDAExecutionProvider"


class Session:
    """An ONNX Runtime session with these execution providers."""

    def __init__(self, *providers: str) -> None:
        self.providers = providers

    def get_providers(self) -> list[str]:
        return list(self.providers)


@pytest.mark.parametrize(("device", "providers"), [("cpu", [CPU]), ("cuda", [GPU, CPU])])
def test_the_provider_that_was_asked_for_is_accepted(device: str, providers: list[str]) -> None:
    from stages.models.onnx import require_device

    require_device(Session(*providers), device)


@pytest.mark.parametrize("providers", [[CPU], [CPU, GPU]])
def test_a_gpu_that_was_asked_for_and_is_not_used_is_an_error(providers: list[str]) -> None:
    from stages.models.onnx import require_device

    with pytest.raises(PlanError, match="asks for a GPU"):
        require_device(Session(*providers), "cuda")


class Mixing(Tower):
    """A tower whose features hold something of the other images of a batch."""

    papers = WEIGHTS["clip-vit-h"]

    def __init__(self, share: float) -> None:
        self.share = share

    def embed(self, images):
        own = images.reshape(len(images), -1)[:, :64].astype(np.float32)
        return {"clip": (own + self.share * own.mean(axis=0)).astype(np.float16)}


def test_a_tower_that_mixes_the_images_of_a_batch_is_refused() -> None:
    Mixing(0)._require_batches_equal_singles()
    with pytest.raises(PlanError, match=r"mixes the images of a batch \(clip\)"):
        Mixing(0.2)._require_batches_equal_singles()


def test_a_parser_that_mixes_the_images_of_a_batch_is_refused() -> None:
    parser = FacexlibParser.__new__(FacexlibParser)
    parser._name = "bisenet"

    def labels_of(own):
        return lambda images: [(labels,) for labels in own(np.stack(images))]

    parser._batches = labels_of(lambda images: images[..., 0] % 19)
    parser._require_batches_equal_singles()
    parser._batches = labels_of(lambda images: (images + images.max(0))[..., 0] % 19)
    with pytest.raises(PlanError, match="bisenet mixes the images of a batch"):
        parser._require_batches_equal_singles()


@pytest.mark.parametrize(("task", "name", "side"), [("face_embedder", "lbp", 112), ("image_embedder", "patches", 224)])
def test_backends_without_weights_give_a_batch_what_they_give_each_image(task: str, name: str, side: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    model = backend(task, name)(ModelSettings(), "cpu")
    for index in range(3):
        together, alone = model.embed(images), model.embed(images[index : index + 1])
        if task == "face_embedder":
            assert (together[index] == alone[0]).all()
        else:
            assert all((together[column][index] == alone[column][0]).all() for column in together)
