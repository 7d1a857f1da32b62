"""SSCD, a descriptor of whole photos that shows edited copies: https://arxiv.org/abs/2202.10261 (MIT)."""

import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from PIL import Image as Pillow

from schemas.arrays import Floats, Image
from schemas.digest import sha256_of_file
from schemas.errors import WeightsError, first_line
from stages.models.torch_backend import IMAGENET, normalise, prepare

COPY = 0.75
"""Least cosine of copies, which the paper's authors name for `sscd_disc_mixup`."""
WIDTH = 512
_SIDE = 288
_POWER = 3


class Sscd:
    """The ResNet-50 of a `.torchvision.pt` of SSCD, on a GPU where torch has one; in float32, one photo at a time."""

    def __init__(self, path: Path) -> None:
        """Raises WeightsError when the file holds anything else."""
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        prepare("cpu")
        from torchvision.models import resnet50  # type: ignore[import-untyped]

        class Pooling(torch.nn.Module):
            """Generalised mean of each channel."""

            def forward(self, activations: Any) -> Any:
                return activations.clamp(min=1e-6).pow(_POWER).mean((2, 3)).pow(1 / _POWER)

        with torch.device("meta"):  # no time on initial values
            model = resnet50(num_classes=WIDTH)
        model.avgpool = Pooling()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of TorchScript, which is refused
                weights = torch.load(path, map_location="cpu", weights_only=True)
            model.load_state_dict({name.removeprefix("backbone."): one for name, one in weights.items()}, assign=True)
            sha256 = sha256_of_file(path)
        except OSError as error:
            raise WeightsError(f"The weights of SSCD, {path}, cannot be read ({first_line(error)}).") from error
        except (RuntimeError, UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
            raise WeightsError(
                f"{path} does not hold SSCD's ResNet-50 as mere weights: give the sscd_disc_mixup.torchvision.pt of "
                "its authors, not the TorchScript file, which holds code."
            ) from error
        self.stamp = {"name": path.stem, "task": "copies", "sha256": sha256, "licence": "not known; SSCD's are MIT"}
        self._model = model.float().eval().requires_grad_(False).to(self.device)

    def __call__(self, photo: Image) -> Floats:
        """The (512,) descriptor of unit length of a (H, W, 3) RGB photo, whose short side gets 288 pixels."""
        import torch

        height, width = photo.shape[:2]
        short = min(height, width)
        small = Pillow.fromarray(photo).resize(
            (_SIDE * width // short, _SIDE * height // short), Pillow.Resampling.BILINEAR
        )
        with torch.inference_mode():
            pixels = torch.from_numpy(normalise(np.asarray(small)[None], IMAGENET)).to(self.device)
            descriptor: Floats = torch.nn.functional.normalize(self._model(pixels))[0].cpu().numpy()
        return descriptor
