"""Writes tiny finished shards straight into a folder or fsspec URL; loaded by path, since tests import no tests."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import cv2
import fsspec
import numpy as np
from safetensors.numpy import save

from schemas.int8 import encode_int8, quantise
from schemas.shard import INT8, Manifest, decode_npy, encode_npy

PORTRAIT, HALF, FULL = (72, 72), (96, 96), (160, 112)
HIDDEN = (5, 8)
POOLED = 6
PHOTO = (160, 112)
BBOX = [60.0, 30.0, 90.0, 70.0]
KPS = [[68.0, 45.0], [82.0, 45.0], [75.0, 52.0], [70.0, 60.0], [80.0, 60.0]]
BOXES = {"portrait": [39, 14, 111, 86], "half": [27, 8, 123, 104], "full": [0, 0, 160, 112]}
SIZES = {"portrait": PORTRAIT, "half": HALF, "full": FULL}
MODELS = [
    {"name": "lbp", "task": "face_embedder", "sha256": "", "licence": "Apache-2.0"},
    {"name": "patches", "task": "image_embedder", "sha256": "", "licence": "Apache-2.0"},
]
EMPTY = {"clip_hidden": np.full(HIDDEN, -7, np.float16), "dino": np.full(HIDDEN, -8, np.float16)}
TARGETS = {"base": "tiny", "kind": "sd15", "vae_sha256": "v", "text_sha256": "t", "resolution": 64}
CUTS = {
    "portrait": {"resized": [64, 64], "offset": [0, 0], "size": [64, 64]},
    "full": {"resized": [91, 64], "offset": [3, 0], "size": [80, 48]},
}

Files = dict[str, bytes]


@cache
def picture(width: int, height: int) -> bytes:
    """Red grows to the right, green to the bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    rgb = np.stack([x, y, np.full_like(x, 128)], axis=2).astype(np.uint8)
    return cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes()


def sample(number: int, has: Sequence[str] = ("portrait", "half", "full"), **changes: Any) -> Files:
    """All files of a sample, whose features tell its number; `changes` go into the json."""
    told = {
        crop: {"box": BOXES[crop], "size": list(SIZES[crop])} if crop in has else {"absent": "too small"}
        for crop in SIZES
    }
    content = {"text": f"caption {number}", "bbox": BBOX, "kps": KPS, "crops": told, **changes}
    files = {
        "arcface.npy": encode_npy(np.full(512, number, np.float32)),
        "clip.npy": encode_npy(np.full(POOLED, number, np.float16)),
        "clip_hidden.npy": encode_npy(np.full(HIDDEN, number, np.float16)),
        "face.jpg": picture(224, 224),
        "json": json.dumps(content).encode(),
        "mask.png": b"not read",
    }
    return files | {f"{crop}.jpg": picture(*SIZES[crop]) for crop in has}


def encoded(number: int, *, mirror: bool = False, **changes: Any) -> Files:
    """A sample with precomputed latents of portrait and full, and text embeddings."""
    targets = {**TARGETS, "latents": CUTS, **changes}
    files = sample(number, targets=targets)
    for crop, cut in CUTS.items():
        width, height = cut["size"]
        files[f"latents.{crop}.npy"] = encode_npy(np.full((4, height // 8, width // 8), number, np.float16))
    files["text.npy"] = encode_npy(np.full((77, 4), number, np.float16))
    return files | (mirrors(number) if mirror else {})


def mirrors(number: int) -> Files:
    """Features of the mirrored face: the negative number."""
    return {
        "clip_mirror.npy": encode_npy(np.full(POOLED, -number, np.float16)),
        "clip_hidden_mirror.npy": encode_npy(np.full(HIDDEN, -number, np.float16)),
    }


def in_int8(files: Files) -> Files:
    """The same sample with its token features in int8."""
    return {
        **{suffix: data for suffix, data in files.items() if suffix not in INT8},
        **{INT8[suffix]: encode_int8(quantise(decode_npy(data))) for suffix, data in files.items() if suffix in INT8},
    }


def tar(samples: Mapping[str, Files]) -> bytes:
    """A tar of key -> files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        for key, files in samples.items():
            for suffix, data in sorted(files.items()):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def manifest(name: str, data: bytes, kept: int, **changes: Any) -> Manifest:
    """The manifest of a shard of these bytes."""
    fields = {
        "shard": name,
        "profile": "embedded",
        "plan_digest": "plan",
        "rows_in": kept,
        "kept": kept,
        "dropped": {},
        "models": MODELS,
        "files": {f"{name}.tar": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}},
    }
    return Manifest(**{**fields, **changes})


def put(url: str, data: bytes) -> None:
    """Write a file at a path or URL, and the folders above it."""
    with fsspec.open(url, "wb", auto_mkdir=True) as stream:
        stream.write(data)


def write(
    root: Any, shards: Mapping[str, Sequence[Files]], *, empty: Mapping[str, Any] | None = EMPTY, **changes: Any
) -> str:
    """Finish shards under `root`; keys are <shard>-<number>. `changes` go into the manifests."""
    for name, samples in shards.items():
        data = tar({f"{name}-{index:03d}": files for index, files in enumerate(samples)})
        put(f"{root}/shards/{name}.tar", data)
        put(f"{root}/shards/{name}.json", manifest(name, data, len(samples), **changes).to_json().encode())
    told = {}
    if empty is not None:
        data = save(dict(empty))
        put(f"{root}/unconditional.safetensors", data)
        told = {"unconditional.safetensors": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    put(f"{root}/dataset.json", json.dumps({"files": told}).encode())
    return str(root)


def counted(first: int, count: int, **options: Any) -> list[Files]:
    """Samples numbered from `first`."""
    return [sample(first + index, **options) for index in range(count)]
