"""Face parsing by facexlib's BiSeNet or ParseNet."""

from collections.abc import Sequence
from pickle import UnpicklingError
from typing import Any

import numpy as np

from schemas.arrays import Floats, Image, Labels
from schemas.errors import PlanError, WeightsError
from stages.models.backends import ModelCard
from stages.models.papers import WEIGHTS, Weight
from stages.models.torch_backend import HALF, IMAGENET, Batches, normaliser, on_device, prepare
from stages.models.weights import card, find
from stages.runtime import Device
from stages.settings import ModelSettings

# fmt: off
BISENET_LABELS = (
    "background", "skin", "left brow", "right brow", "left eye", "right eye", "glasses", "left ear", "right ear",
    "earring", "nose", "mouth", "upper lip", "lower lip", "neck", "necklace", "cloth", "hair", "hat",
)
PARSENET_LABELS = (
    "background", "skin", "nose", "glasses", "left eye", "right eye", "left brow", "right brow", "left ear",
    "right ear", "mouth", "upper lip", "lower lip", "hair", "hat", "earring", "necklace", "neck", "cloth",
)
# fmt: on
_TO_BISENET = {
    "bisenet": np.arange(len(BISENET_LABELS), dtype=np.uint8),
    "parsenet": np.array([BISENET_LABELS.index(label) for label in PARSENET_LABELS], np.uint8),
}
_GPU_BATCH = 16
_SAME_LABELS = 0.999
"""Share of a crop: where two labels are next to equal, a last bit may decide."""
_MEAN_STD = {"bisenet": IMAGENET, "parsenet": HALF}


class FacexlibParser:
    """The parser that `models.parser` names: float32 and one image at a time on a CPU, float16 and batches on a GPU."""

    def __init__(self, settings: ModelSettings, device: Device) -> None:
        prepare(device)
        self.runtime = f"torch {device}"
        self._name = settings.parser
        import torch
        from facexlib.parsing import bisenet, parsenet

        path = find(WEIGHTS[self._name], settings)
        is_bisenet = self._name == "bisenet"
        with torch.device("meta"):  # no time on initial values
            model = bisenet.BiSeNet(num_class=19) if is_bisenet else parsenet.ParseNet(512, 512, parsing_ch=19)
        try:
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
        except (UnpicklingError, RuntimeError, EOFError, TypeError, AttributeError) as error:
            raise WeightsError(
                f"{path} holds no weights of facexlib's {self._name} ({error}): fetch it again."
            ) from error
        self._batches = label_batches(model, _MEAN_STD[self._name], device, compiled=settings.compile)
        if device == "cuda":
            self._require_batches_equal_singles()

    @classmethod
    def weights(cls, settings: ModelSettings) -> tuple[Weight, ...]:
        return (WEIGHTS[settings.parser],)

    @classmethod
    def cards(cls, settings: ModelSettings) -> list[ModelCard]:
        return [card(WEIGHTS[settings.parser], "segmenter", settings)]

    def segment(self, image: Image, kps: Floats) -> Labels:
        """(512, 512) labels in BiSeNet's order of an FFHQ-style (512, 512, 3) RGB crop; `kps` are not needed."""
        return self.segment_all([image])[0]

    def _require_batches_equal_singles(self) -> None:
        """Prove that a crop's labels do not depend on the other crops of a batch."""
        images = list(np.random.default_rng(0).integers(0, 256, (2, 512, 512, 3), np.uint8))
        for together, image in zip(self.segment_all(images), images, strict=True):
            if np.mean(together == self.segment_all([image])[0]) < _SAME_LABELS:
                raise PlanError(f"{self._name} mixes the images of a batch: set executor.gpus = 0.")

    def segment_all(self, images: Sequence[Image]) -> list[Labels]:
        """`segment` of each image, in batches on a GPU."""
        return [_TO_BISENET[self._name][labels] for (labels,) in self._batches(images)]


def label_batches(
    model: Any, mean_std: tuple[Sequence[float], Sequence[float]], device: Device, *, compiled: bool = False
) -> Batches:
    """A parser of facexlib in batches: (N, 512, 512, 3) RGB uint8 -> its own labels, (N, 512, 512) uint8."""
    import torch

    dtype = torch.float16 if device == "cuda" else torch.float32
    model = on_device(model, device, dtype)
    normalise = normaliser(*mean_std, device, dtype)

    def labels(images: Any) -> tuple[Any]:
        return (model(normalise(images))[0].argmax(1).to(torch.uint8),)

    return Batches(labels, _GPU_BATCH if device == "cuda" else 1, device, compiled=compiled)
