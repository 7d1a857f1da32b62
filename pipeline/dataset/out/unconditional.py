"""The features that stand for "no face" in training and guidance, computed once per dataset, beside its shards."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.dataset.out.output import fingerprint
from pipeline.dataset.plan import Plan
from pipeline.shared.files import AnyPath, write, writing
from schemas.arrays import Halves
from schemas.digest import sha256
from schemas.shard import UNCONDITIONAL
from stages.models.backends import ImageEmbedder, backend

_MADE = "made"
"""The only entry of the file's metadata: several would be written in any order."""

Features = Mapping[str, Halves]


def write_unconditional(root: AnyPath, plan: Plan) -> dict[str, dict[str, Any]]:
    """Write the file unless it is there, whole and of this plan's image embedder; returns dataset.json's entry of it.

    The embedder runs in this process, on the CPU, and is let go. A dataset without embeddings needs no such file.

    Raises:
        OutputError: when it cannot be written.
    """
    if not plan.config.pack.embeddings:
        return {}
    path = root / UNCONDITIONAL
    try:
        data = path.read_bytes()
        made = _made(load(data), plan)
        # `load` does not return the metadata that its header holds.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        is_current = header.get("__metadata__", {}).get(_MADE) == made
    except (SafetensorError, OSError, ValueError, TypeError, KeyError):
        is_current = False
    if not is_current:
        settings = plan.config.models
        embedder: ImageEmbedder = backend("image_embedder", settings.image_embedder)(settings, "cpu")
        features = dict(embedder.unconditional())
        with writing(path):
            write(path, save(features, metadata={_MADE: _made(features, plan)}))
    return {UNCONDITIONAL: fingerprint(path)}


def _made(features: Features, plan: Plan) -> str:
    """What the features were made by, and their hashes: damage shows and is made good without the models."""
    models = [model for model in plan.model_list if model["task"] == "image_embedder"]
    hashes = {name: sha256(np.ascontiguousarray(array).tobytes()) for name, array in features.items()}
    return json.dumps({"models": models, "sha256": hashes}, sort_keys=True)
