"""Heads: small networks that read one number off CLIP's `image_embeds`, such as how likely a face is that of a photo.

A file of safetensors holds linear layers, named as torch.nn.Sequential names them (`0.weight`, `0.bias`, `2.weight`, …;
one alone may be `weight`). Its metadata say the rest: `activation` (relu, or none) between layers whose numbers do not
follow on one another, `output` (sigmoid, softmax: the first of its numbers counts, or none), `licence`, and `weights`,
the sha256 of the image embedder's that it was made for.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from schemas.arrays import Doubles, Halves
from schemas.digest import sha256_of_file
from schemas.errors import ConfigError, WeightsError, first_line
from stages.models.backends import ModelCard, backend
from stages.models.weights import located, stated_card, weight_state
from stages.settings import ModelSettings, Settings

MEASURES = {"photo": "photo", "aesthetic": "aesthetic", "nsfw": "nsfw_score"}
"""Key of `models.heads` -> the column that it gives. `photo` looks at the face crop, the others at the whole photo."""
PHOTO_FILE = "photo.safetensors"
"""What `python -m pipeline models fetch photo` makes beside the weights of the image embedder."""


class Layer(NamedTuple):
    weight: Doubles
    """(out, in)"""
    bias: Doubles
    """(out,)"""
    after_relu: bool


@dataclass(frozen=True)
class Head:
    """The layers of a file, and what it says of itself."""

    path: Path
    layers: tuple[Layer, ...]
    metadata: Mapping[str, str]

    @property
    def sha256(self) -> str:
        return sha256_of_file(self.path)

    def __call__(self, embeds: Halves) -> Doubles:
        """(N,) of `image_embeds` (N, D) of any length; one by one, so that none depends on its batch."""
        output, values = self.metadata.get("output"), []
        for vector in embeds.astype(np.float64):
            x = vector / max(float(np.linalg.norm(vector)), 1e-12)
            for weight, bias, after_relu in self.layers:
                x = weight @ (np.maximum(x, 0) if after_relu else x) + bias
            if output == "sigmoid":
                x = np.append(x, 0)
            if output in ("sigmoid", "softmax"):
                x = np.exp(x - x.max())
                x /= x.sum()
            values.append(x[0])
        return np.array(values, np.float64)


def read_head(path: Path) -> Head:
    """The head in a file; a WeightsError when that holds anything but linear layers that lead to one number."""
    try:
        with safe_open(path, framework="np") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError) as error:
        raise WeightsError(
            f"{path} cannot be read as a safetensors file ({first_line(error)}): models.heads need one."
        ) from error
    activation, output = metadata.get("activation", "none"), metadata.get("output", "none")
    numbers = {name: int((re.findall(r"\d+", name) or ["0"])[-1]) for name in tensors if name.endswith("weight")}
    layers: list[Layer] = []
    before = width = 0
    for name in sorted(numbers, key=numbers.__getitem__):
        weight = tensors.pop(name).astype(np.float64)
        bias = tensors.pop(f"{name.removesuffix('weight')}bias", np.zeros(weight.shape[:1])).astype(np.float64)
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or (layers and weight.shape[1] != width):
            tensors[name] = weight
            break
        layers.append(Layer(weight, bias, bool(layers) and activation == "relu" and numbers[name] != before + 1))
        before, width = numbers[name], len(weight)
    words_known = activation in ("none", "relu") and output in ("none", "sigmoid", "softmax")
    finite = all(np.isfinite(layer.weight).all() and np.isfinite(layer.bias).all() for layer in layers)
    if tensors or not words_known or not finite or not (width == 1 or (width > 1 and output == "softmax")):
        raise WeightsError(
            f"{path} is no head: models.heads need linear layers of finite numbers that fit on one another and end in "
            "one number (in several with output = softmax), and in the metadata activation = relu or none, output = "
            "sigmoid, softmax or none."
        )
    return Head(path, tuple(layers), metadata)


def heads_of(settings: Settings) -> dict[str, Head]:
    """Key of `models.heads` -> head, of those that these settings use: named ones, and `photo` where it was made.

    Raises:
        ConfigError: when nothing computes CLIP's `image_embeds`.
        WeightsError: when a file is no head.
    """
    models = settings.models
    embedder = backend("image_embedder", models.image_embedder)
    files = {name: Path(path).expanduser() for name, path in models.heads.items() if path}
    if hasattr(embedder, "text") and settings.pack.embeddings:
        folder = weight_state(embedder.papers, models).path
        if folder and "photo" not in models.heads and (folder / PHOTO_FILE).is_file():
            files["photo"] = folder / PHOTO_FILE
    elif files:
        raise ConfigError(
            "models.heads read CLIP's image_embeds: set models.image_embedder = clip-vit-h and pack.embeddings = true, "
            "or leave models.heads out."
        )
    return {name: read_head(files[name]) for name in MEASURES if name in files}


def head_cards(heads: Mapping[str, Head], settings: ModelSettings) -> list[ModelCard]:
    """The cards of heads; the licence is what the file says.

    Raises:
        WeightsError: when one is for vectors of another width, or for other weights than those that are here.
    """
    embedder, cards = backend("image_embedder", settings.image_embedder), []
    for name, head in heads.items():
        weights, is_ready = located(embedder.papers, "image_embedder", settings)
        given = head.layers[0].weight.shape[1]
        config = json.loads((weights.parent / "config.json").read_bytes()) if is_ready else {}
        if given != config.get("projection_dim", given):
            raise WeightsError(
                f"{head.path} reads vectors of {given} numbers, but those of {embedder.papers.name} have "
                f"{config['projection_dim']}: set models.heads.{name} to a head that was made for it."
            )
        if is_ready and head.metadata.get("weights") not in (None, sha256_of_file(weights)):
            raise WeightsError(
                f"{head.path} was made for other weights than {weights}: make it again"
                f"{' by `python -m pipeline models fetch photo`' if name == 'photo' else ''}, or name another."
            )
        licence = head.metadata.get("licence", "")
        cards.append(stated_card(head.path.name, name, head.sha256, licence, "its metadata"))
    return cards
