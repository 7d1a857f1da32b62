"""Vision towers of transformers, from a local folder: what CLIP and DINOv2 share."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from schemas.arrays import Halves, Image
from schemas.errors import PlanError, WeightsError
from schemas.targets import variant_of
from stages.models.backends import ModelCard
from stages.models.papers import Weight
from stages.models.torch_backend import Batches, normaliser, prepare, to_host
from stages.models.weights import card, find
from stages.runtime import Device
from stages.settings import ModelSettings

Features = dict[str, Halves]
"""Column -> features, images first."""

_GPU_BATCH = 32
_TOLERANCE = 2e-2


class Tower:
    """An image embedder; subclasses name the weights and pick the features.

    Shapes follow the folder's config. The CPU computes in float32 and one image at a time, so that an image's bytes
    do not depend on its neighbours; a GPU computes in float16 and in batches, and proves first that they do not mix.
    """

    papers: ClassVar[Weight]
    model_class: ClassVar[str]
    """Name in transformers."""
    mean_std: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]
    """Of the pixels that the model was trained on."""

    def __init__(self, settings: ModelSettings, device: Device) -> None:
        prepare(device)
        self._device = device
        self.runtime = f"torch {device}"
        import transformers

        folder = find(self.papers, settings)
        self._model = load_folder(getattr(transformers, self.model_class), folder, self._device)
        self._batches = self.batches(device)
        if self._device == "cuda":
            self._require_batches_equal_singles()

    @classmethod
    def weights(cls, settings: ModelSettings) -> tuple[Weight, ...]:
        return (cls.papers,)

    @classmethod
    def cards(cls, settings: ModelSettings) -> list[ModelCard]:
        return [card(cls.papers, "image_embedder", settings)]

    def embed(self, images: Image) -> Features:
        columns = map(np.stack, zip(*self._batches(images), strict=True))
        return {name: column.astype(np.float16) for name, column in zip(self._columns, columns, strict=True)}

    def batches(self, device: Device, size: int = 0, *, graphs: bool = True) -> Batches:
        """The tower as a function of (N, 224, 224, 3) RGB uint8 images; sets `_columns`, what its outputs are."""
        normalise = normaliser(*self.mean_std, device, self._model.dtype)
        self._columns: tuple[str, ...] = ()

        def features(images: Any) -> tuple[Any, ...]:
            picked = self._features(normalise(images))
            self._columns = tuple(picked)
            return tuple(picked.values())

        return Batches(features, size or (1 if device == "cpu" else _GPU_BATCH), device, graphs=graphs)

    def unconditional(self) -> Features:
        import torch

        with torch.inference_mode():
            features = self._features(torch.zeros((1, 3, 224, 224), dtype=self._model.dtype, device=self._device))
        return {name: to_host(feature[0]).astype(np.float16) for name, feature in features.items() if name != "clip"}

    def _features(self, pixels: Any) -> dict[str, Any]:
        """Column -> tensor, for normalised (N, 3, 224, 224) pixels."""
        raise TypeError(f"{type(self).__name__} does not define _features()")

    def _require_batches_equal_singles(self) -> None:
        images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
        together = self.embed(images)
        for i in range(2):
            for column, alone in self.embed(images[i : i + 1]).items():
                difference = np.linalg.norm(together[column][i].astype(np.float32) - alone[0].astype(np.float32))
                if difference > _TOLERANCE * np.linalg.norm(alone[0].astype(np.float32)):
                    name = self.papers.name
                    raise PlanError(f"{name} mixes the images of a batch ({column}): set executor.gpus = 0.")


def load_folder(model_class: Any, folder: Path, device: str, gpu_dtype: str = "float16") -> Any:
    """A model of transformers or diffusers, of a local folder (config.json, *.safetensors): float32 on the CPU.

    Pickled weights are never read, nothing is looked up on the hub, and every parameter must be in the file.

    Raises:
        WeightsError: when the folder does not hold this kind of model.
    """
    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = getattr(torch, gpu_dtype) if device == "cuda" else torch.float32
    # `torch_dtype` is known to all releases of both libraries; `dtype` to transformers from 4.56 on
    options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True, "torch_dtype": dtype}
    options["variant"] = variant_of(folder)
    try:
        model, info = model_class.from_pretrained(str(folder), **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{folder} cannot be loaded as {model_class.__name__} ({error}): fetch it again.") from error
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise WeightsError(f"{folder} is no complete {model_class.__name__} ({first} is missing): fetch it again.")
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer of a local folder; raises WeightsError when it holds none."""
    import transformers

    try:
        return transformers.CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder} cannot be loaded as a CLIP tokenizer ({error}): fetch it again.") from error
