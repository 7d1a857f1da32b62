"""The judges of images: an insightface pack, and CLIP.

The pack is best another one than that which made the condition, which has learned to please that one.
"""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import transformers

from pipeline.shared.bases import card_licence
from pipeline.train.adapters.released import DAMAGED
from schemas.arcface import ARCFACE_SIZE, LICENCES
from schemas.arrays import Doubles, Floats, Image
from schemas.digest import sha256_of_file
from schemas.errors import ConfigError, WeightsError, first_line

_DET_SIZE = (640, 640)
NOT_KNOWN = "not known"
_TASKS = {"detection": "detector", "recognition": "face_embedder"}
_PACKS = "~/.insightface/models"


class Look(NamedTuple):
    embedding: Floats
    """(512,), normed."""
    kps: Floats
    """(5, 2), in pixels of the image, or of the image with a border around."""


class IdJudge:
    """The detector and the recogniser of an insightface pack, on the CPU."""

    def __init__(self, pack: str, option: str = "watch.judge") -> None:
        """Load a pack: a folder, or the name of one under ~/.insightface/models; nothing is ever fetched.

        `option` is what the user gave it by.

        Raises:
            WeightsError: when there is no such folder, or it holds no detector or no recogniser.
            ConfigError: without ONNX Runtime.
        """
        folders = [Path(pack).expanduser(), Path(_PACKS).expanduser() / pack]
        # Insightface would fetch a pack that it does not find.
        folder = next((folder for folder in folders if any(folder.glob("*.onnx"))), None)
        if folder is None:
            raise WeightsError(
                f"{option}: {pack} is no folder with an insightface pack (*.onnx files): give the folder of one, "
                f"such as {_PACKS}/antelopev2."
            )
        try:
            from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
            from insightface.app import FaceAnalysis
            from onnxruntime.capi import onnxruntime_pybind11_state as ort
        except ImportError as error:
            raise ConfigError(f"{option} needs ONNX Runtime ({error}): pip install onnxruntime.") from error
        folder = folder.resolve()
        lacks = "{}: {} holds no {} model of insightface; give the folder of a whole pack.".format
        no_models = (ort.Fail, ort.InvalidArgument, ort.InvalidGraph, ort.InvalidProtobuf, ort.NotImplemented)
        allowed = {"allowed_modules": list(_TASKS), "providers": ["CPUExecutionProvider"]}
        try:
            self._app: Any = FaceAnalysis(str(folder), **allowed)
        except AssertionError as error:  # without a detector
            raise WeightsError(lacks(option, folder, "detection")) from error
        except (*no_models, DecodeError) as error:
            raise WeightsError(
                f"{option}: a file in {folder} cannot be loaded by ONNX Runtime ({error}): fetch the pack again."
            ) from error
        if "recognition" not in self._app.models:
            raise WeightsError(lacks(option, folder, "recognition"))
        self._app.prepare(ctx_id=-1, det_size=_DET_SIZE)
        files = {task: Path(model.model_file) for task, model in self._app.models.items()}
        hashes = {task: sha256_of_file(file) for task, file in files.items()}
        self.weights = [
            {"name": files[task].stem, "task": _TASKS[task], "sha256": sha, "licence": LICENCES.get(sha, NOT_KNOWN)}
            for task, sha in hashes.items()
        ]
        """name, task (detector, face_embedder), sha256 and licence, which is known by the hash."""

    def look(self, image: Image) -> Look | None:
        """The largest face of an image (H, W, 3), RGB; None where there is none."""
        bgr = np.ascontiguousarray(image[..., ::-1])
        border = max(bgr.shape) // 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # insightface calls an old name of scikit-image
            # SCRFD misses a face that fills the image, so it gets a second look with a border around.
            seen = self._app.get(bgr) or self._app.get(
                cv2.copyMakeBorder(bgr, border, border, border, border, cv2.BORDER_CONSTANT)
            )
        largest = max(seen, key=lambda one: np.prod(one.bbox[2:4] - one.bbox[:2]), default=None)
        return None if largest is None else Look(largest.normed_embedding, largest.kps)

    def embed(self, face: Image) -> Floats:
        """Normed ID vector (512,) of an aligned crop, which is too tight for a detector."""
        small = cv2.resize(face, (ARCFACE_SIZE, ARCFACE_SIZE), interpolation=cv2.INTER_AREA)
        bgr = np.ascontiguousarray(small[..., ::-1])
        vector: Floats = self._app.models["recognition"].get_feat(bgr).flatten()
        return vector / np.linalg.norm(vector)


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
        except DAMAGED as error:
            raise WeightsError(f"{wrong}: {first_line(error)}.") from error
        if report["missing_keys"]:  # an image tower alone, as IP-Adapter's folder has it
            raise WeightsError(f"{wrong}: its files lack {min(report['missing_keys'])}.")
        self._model: Any = model.eval().requires_grad_(False).to(device)
        about = {"name": path.resolve().name, "task": "clip", "licence": card_licence(path) or NOT_KNOWN}
        self.weights = [{**about, "sha256": sha256_of_file(file)} for file in sorted(path.glob("*.safetensors"))]

    @torch.no_grad()
    def image(self, image: Image) -> Doubles:
        """(H, W, 3) RGB to a unit vector."""
        pixels = self._processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        return self._unit(self._model.get_image_features(pixel_values=pixels.to(self._model.device)))

    @torch.no_grad()
    def text(self, prompt: str) -> Doubles:
        """A prompt, cut at as many tokens as the model takes, to a unit vector."""
        words = self._processor.tokenizer([prompt], truncation=True, return_tensors="pt").to(self._model.device)
        return self._unit(self._model.get_text_features(**words))

    @staticmethod
    def _unit(features: Any) -> Doubles:
        # A tensor, or from transformers 5 on an output that holds it.
        vector: Doubles = getattr(features, "pooler_output", features)[0].double().cpu().numpy()
        return np.asarray(vector / np.linalg.norm(vector))
