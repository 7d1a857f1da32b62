"""CLIP as a judge of images: how they follow their prompts, and how alike they are."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from pipeline.shared.bases import card_licence
from pipeline.train.base_model import UNREADABLE
from pipeline.train.loader import Pixels
from pipeline.train.validate.judge import NOT_KNOWN
from schemas.arcface import Floats
from schemas.digest import sha256_of_file
from schemas.errors import WeightsError, first_line


class Clip:
    """Both towers of a CLIP, from a folder in transformers' layout."""

    def __init__(self, folder: str, device: str, option: str = "watch.clip") -> None:
        """Load it; nothing is ever fetched. `option` is what the user gave it by.

        Raises:
            WeightsError: when the folder holds no whole CLIPModel with its tokenizer and preprocessor.
        """
        path, options = Path(folder).expanduser(), {"local_files_only": True}
        wrong = f"{option}: {folder} is no folder of a whole CLIP (CLIPModel, tokenizer and image processor)"
        if not path.is_dir():
            raise WeightsError(f"{wrong}: there is no such folder.")
        try:
            self._processor: Any = transformers.CLIPProcessor.from_pretrained(path, **options)
            model, report = transformers.CLIPModel.from_pretrained(
                path, use_safetensors=True, output_loading_info=True, **options
            )
        except (*UNREADABLE, AttributeError) as error:
            raise WeightsError(f"{wrong}: {first_line(error)}.") from error
        if report["missing_keys"]:  # an image tower alone, as IP-Adapter's folder has it
            raise WeightsError(f"{wrong}: its files lack {min(report['missing_keys'])}.")
        self._model: Any = model.eval().requires_grad_(False).to(device)
        about = {"name": path.resolve().name, "task": "clip", "licence": card_licence(path) or NOT_KNOWN}
        self.weights = [{**about, "sha256": sha256_of_file(file)} for file in sorted(path.glob("*.safetensors"))]

    @torch.no_grad()
    def image(self, image: Pixels) -> Floats:
        """(H, W, 3) RGB to a unit vector."""
        pixels = self._processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        return self._unit(self._model.get_image_features(pixel_values=pixels.to(self._model.device)))

    @torch.no_grad()
    def text(self, prompt: str) -> Floats:
        """A prompt, cut at as many tokens as the model takes, to a unit vector."""
        words = self._processor.tokenizer([prompt], truncation=True, return_tensors="pt").to(self._model.device)
        return self._unit(self._model.get_text_features(**words))

    @staticmethod
    def _unit(features: Any) -> Floats:
        # A tensor, or from transformers 5 on an output that holds it.
        vector: Floats = getattr(features, "pooler_output", features)[0].double().cpu().numpy()
        return np.asarray(vector / np.linalg.norm(vector))
