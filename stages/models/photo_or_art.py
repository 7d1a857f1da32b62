"""The head that tells photos from art, made of words for either, which CLIP embeds as it does pictures of them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from schemas.digest import sha256_of_file
from schemas.errors import WeightsError
from stages.models.backends import backend
from stages.models.heads import PHOTO_FILE
from stages.models.papers import WEIGHTS, Weight, WeightFile
from stages.models.torch_backend import prepare
from stages.models.tower import load_folder, load_tokenizer
from stages.models.weights import find, located, weight_state
from stages.settings import ModelSettings

CLASSES = (
    ("a photo of a face", "a photograph of a person", "a portrait photo", "a close-up photo of a real human face"),
    ("a painting of a face", "an oil painting of a person", "a watercolor portrait"),
    ("a drawing of a face", "a pencil sketch of a person", "an engraving of a face"),
    ("a cartoon face", "an anime character", "a comic book illustration of a person"),
    ("the face of a statue", "a marble bust", "a stone sculpture of a head"),
    ("the face of a doll", "a mask of a face", "a wax figure"),
    ("a computer-generated 3d render of a face", "a video game character"),
    ("the face of an animal", "a photo of an animal"),
)
"""The words: photos of people first, then all else in which detectors see faces. A class is the mean of its words."""


def photo_papers(settings: ModelSettings) -> Weight:
    """The head as weights of one file, beside those of clip-vit-h, wherever these are or belong."""
    images, text = WEIGHTS["clip-vit-h"], WEIGHTS["clip-vit-h-text"]
    file = WeightFile(str(weight_state(images, settings).target / PHOTO_FILE), "photo")
    return replace(text, name="photo", files=(file,), preprocessing="image_embeds of CLIP", made_of=text)


def photo_head(settings: ModelSettings) -> tuple[Path, bytes]:
    """The head's file: where runs look for it, beside the weights of the image embedder, and what belongs into it.

    Raises:
        WeightsError: when weights are missing or not of one model.
    """
    prepare("cpu")
    import torch
    import transformers
    from safetensors.torch import save
    from torch.nn.functional import normalize

    embedder = backend("image_embedder", settings.image_embedder)
    if not hasattr(embedder, "text"):
        raise WeightsError(f"models.image_embedder = {settings.image_embedder} knows no words: set clip-vit-h.")
    find(embedder.papers, settings)
    images, folder = located(embedder.papers, "image_embedder", settings)[0], find(embedder.text, settings)
    model = load_folder(transformers.CLIPModel, folder, "cpu")
    tokenizer = load_tokenizer(folder)
    with safe_open(images, framework="pt") as file:
        projection, own = file.get_tensor("visual_projection.weight").float(), model.visual_projection.weight
    if projection.shape != own.shape or not torch.allclose(projection, own, atol=1e-3):
        raise WeightsError(f"{folder} is not the model that {images} is the image tower of: fetch both again.")

    with torch.inference_mode():

        def mean(words: Sequence[str]) -> Any:
            tokens = [tokenizer(one, return_tensors="pt").input_ids for one in words]
            embeds = [model.text_projection(model.text_model(input_ids=one).pooler_output)[0] for one in tokens]
            return normalize(torch.stack([normalize(one, dim=0) for one in embeds]).mean(dim=0), dim=0)

        weight = model.logit_scale.exp() * torch.stack([mean(words) for words in CLASSES])
    metadata = {
        "output": "softmax",
        "licence": embedder.text.licence,
        "weights": sha256_of_file(images),
        "words": json.dumps(CLASSES),
    }
    # The same bytes wherever it is made: rounded, with a header in order, which safetensors leaves to chance.
    data = save({"weight": (weight * 1024).round() / 1024}, metadata)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:start]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return images.parent / PHOTO_FILE, len(header).to_bytes(8, "little") + header + data[start:]
