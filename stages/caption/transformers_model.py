"""An image-text model of transformers, from a local folder: BLIP, GIT, and those that chat, such as Qwen-VL, LLaVA."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from schemas.arrays import Image
from schemas.digest import sha256_of_file, sha256_of_json
from schemas.errors import WeightsError
from stages.models.backends import ModelCard
from stages.models.torch_backend import DEVICE, prepare
from stages.models.tower import load_folder
from stages.models.weights import stated_card
from stages.runtime import Device
from stages.settings import ModelSettings, Settings

_GPU_BATCH = 8
_READ = {".safetensors", ".json", ".jinja", ".model", ".txt"}
"""Suffixes of what decides a caption: weights, configs, template and words."""


class Folder:
    """Always takes the likeliest word. A CPU takes one picture at a time; a GPU computes batches, in bfloat16."""

    def __init__(self, settings: Settings, device: Device) -> None:
        prepare(device)
        import transformers

        folder, options = _folder(settings.models), {"local_files_only": True, "trust_remote_code": False}
        self.batch = 1 if device == "cpu" else _GPU_BATCH
        try:
            self._processor = transformers.AutoProcessor.from_pretrained(folder, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise WeightsError(f"{folder} has no processor that transformers can load ({error}).") from error
        self._model = load_folder(transformers.AutoModelForImageTextToText, folder, device, "bfloat16")
        self._words: dict[str, Any] = {}
        self._begun = ""
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": settings.caption.prompt}]
            turn = [{"role": "user", "content": content}]
            self._words["text"] = self._processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            self._processor.tokenizer.padding_side = "left"
            if self._words["text"].rstrip().endswith("<think>"):  # the answer goes on from there
                self._begun = "<think>"
        self._most = settings.caption.max_tokens

    @classmethod
    def card(cls, settings: Settings) -> ModelCard:
        folder = _folder(settings.models)
        files = sorted(path for path in folder.iterdir() if path.suffix in _READ)
        sha256 = sha256_of_json({path.name: sha256_of_file(path) for path in files})
        return stated_card(folder.resolve().name, "captioner", sha256, _licence(folder), "its README.md")

    def caption(self, images: Sequence[Image]) -> list[str]:
        import torch

        words = {"text": [self._words["text"]] * len(images), "padding": True} if self._words else {}
        # A picture of its own list each: so the processors of chat models know whose it is.
        pictures = [[image] for image in images] if self._words else list(images)
        given = self._processor(images=pictures, return_tensors="pt", **words)
        with DEVICE, torch.inference_mode():
            given = given.to(self._model.device, self._model.dtype)
            tokens = self._model.generate(**given, max_new_tokens=self._most, do_sample=False, num_beams=1).cpu()
            question = given["input_ids"].cpu() if self._words else None
        # those that chat repeat the question, those with an encoder do not
        if question is not None and torch.equal(tokens[:, : question.shape[1]], question):
            tokens = tokens[:, question.shape[1] :]
        return [f"{self._begun}{text}" for text in self._processor.batch_decode(tokens, skip_special_tokens=True)]


def _licence(folder: Path) -> str:
    """What the front matter of the folder's card says, as the hub has it; empty where it says nothing."""
    try:
        text = (folder / "README.md").read_text(errors="replace")
        front = yaml.safe_load(text.partition("---")[2].partition("\n---")[0]) if text.startswith("---") else None
    except (OSError, yaml.YAMLError):
        return ""
    card = front if isinstance(front, dict) else {}
    licence = card.get("license_name", "other") if card.get("license") == "other" else card.get("license")
    return ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence or "")


def _folder(models: ModelSettings) -> Path:
    folder = Path(models.captioner).expanduser()
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise WeightsError(
            f"models.captioner = {models.captioner!r} is neither a folder of transformers (config.json, *.safetensors) "
            "nor the URL of an endpoint."
        )
    return folder
