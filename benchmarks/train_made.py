"""What train_loop.py trains on: bases and image encoders of the published sizes with random weights, shards and photos.

Neither speed nor memory depends on what the weights and pictures are.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import diffusers
import numpy as np
import torch
import transformers
from safetensors.numpy import save
from safetensors.torch import save_file
from webdataset import TarWriter

from pipeline.shared import tiny
from pipeline.shared.bases import BaseSource, find_base
from schemas.buckets import Fit
from schemas.int8 import encode_int8, quantise
from schemas.shard import Manifest, decode_npy, encode_npy
from schemas.targets import BaseKind, Targets, text_sha256, vae_sha256

SHARD = 200
PHOTOS = 5
"""Of each person, side by side."""
CROPS = {"portrait": (1024, 1024, 90), "half": (1024, 1024, 95), "full": (1536, 1024, 95)}
"""Width, height and JPEG quality."""
UNETS: dict[BaseKind, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280)},
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""What the published UNets' configs say besides diffusers' defaults."""
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}
TEXTS: dict[str, dict[str, Any]] = {
    "text_encoder": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "text_encoder_2": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
}
VISION: dict[bool, dict[str, Any]] = {
    False: {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "projection_dim": 1024},
    True: {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 32},
}
"""ViT-H/14, or (True) a tiny one."""


def _picture(width: int, height: int, quality: int) -> bytes:
    """A JPEG of soft shapes and some grain: 150 to 500 kB, as photos have."""
    rng = np.random.default_rng(width + quality)
    soft = cv2.resize(rng.integers(0, 256, (16, 16, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    pixels = np.clip(soft + rng.normal(0, 4, (height, width, 1)), 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


@functools.cache
def _pictures() -> dict[str, bytes]:
    """Suffix -> content."""
    crops = {f"{crop}.jpg": _picture(*sizes) for crop, sizes in CROPS.items()}
    return {"face.jpg": _picture(224, 224, 95), "mask.png": bytes(1000), **crops}


@dataclass(frozen=True)
class Made:
    """Everything that lies on disk."""

    base: Path
    vision: Path
    """Folder of the CLIP image tower."""
    shards: Path
    photos: Path
    """N.jpg, N.face.jpg and N.npy (ID vector): what the published tutorial reads."""


def make(folder: Path, kind: BaseKind, resolution: int, samples: int, *, is_tiny: bool) -> Made:
    """All of it; what is in `folder` already is used again."""
    base = folder / f"base-{kind}"
    if is_tiny:
        base = find_base("tiny", sdxl=kind == "sdxl").folder
    elif not base.is_dir():
        write_base(base, kind)
    vision, shards = f"vision{'-tiny' * is_tiny}", f"out-{base.name}-{resolution}-{samples}"
    made = Made(base, folder / vision, folder / shards, folder / "photos")
    if not made.vision.is_dir():
        _write_model(made.vision, lambda: _tower(VISION[is_tiny]))
    if not made.shards.is_dir():
        write_shards(made.shards, find_base(str(base)), resolution, samples, VISION[is_tiny])
    _write_photos(made.photos, min(samples, 64))
    return made


def write_base(folder: Path, kind: BaseKind) -> None:
    _write_model(folder / "unet", lambda: diffusers.UNet2DConditionModel(**UNETS[kind]))
    write_encoders(folder, kind)
    diffusers.DDPMScheduler(**tiny.NOISE).save_pretrained(folder / "scheduler")


def write_encoders(folder: Path, kind: BaseKind) -> None:
    """VAE, text encoders and tokenizers."""
    factor = 0.18215 if kind == "sd15" else 0.13025
    _write_model(folder / "vae", lambda: diffusers.AutoencoderKL(**VAE, scaling_factor=factor))
    _write_model(folder / "text_encoder", lambda: _text_encoder("text_encoder"))
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    if kind == "sdxl":
        _write_model(folder / "text_encoder_2", lambda: _text_encoder("text_encoder_2"))
        tiny.tokenizer().save_pretrained(folder / "tokenizer_2")


def _text_encoder(part: str) -> Any:
    sizes = TEXTS[part]
    special = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}  # of the tiny tokenizer
    config = transformers.CLIPTextConfig(**sizes, **special, intermediate_size=4 * sizes["hidden_size"])
    return (transformers.CLIPTextModelWithProjection if part.endswith("2") else transformers.CLIPTextModel)(config)


def _tower(sizes: Mapping[str, Any]) -> Any:
    config = transformers.CLIPVisionConfig(
        **sizes, intermediate_size=4 * sizes["hidden_size"], patch_size=14, image_size=224, hidden_act="gelu"
    )
    return transformers.CLIPVisionModelWithProjection(config)


def _write_model(folder: Path, built: Callable[[], Any]) -> None:
    """Config and random bfloat16 weights, which are read in any precision; nothing is initialised twice."""
    with torch.device("meta"):
        model = built()
    folder.mkdir(parents=True)
    is_diffusers = isinstance(model, diffusers.ModelMixin)
    (model.save_config if is_diffusers else model.config.save_pretrained)(folder)
    name = "diffusion_pytorch_model.safetensors" if is_diffusers else "model.safetensors"
    state = {key: _random(key, tensor) for key, tensor in model.state_dict().items()}
    save_file(state, folder / name, metadata={"format": "pt"})


def _random(key: str, like: torch.Tensor) -> torch.Tensor:
    """Weights that keep activations near one: numbers that under- or overflow would change the speed."""
    made = torch.zeros(like.shape, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
    if like.ndim < 2:
        return made.fill_(float(key.endswith("weight"))).cpu()
    return made.normal_(std=1 / math.sqrt(like[0].numel())).cpu()


def write_shards(
    out: Path, base: BaseSource, resolution: int, samples: int, vision: Mapping[str, Any], hidden: str = "fp16"
) -> None:
    """A dataset made --with latents,text: all files in their real sizes, all targets square."""
    rng, description = np.random.default_rng(0), _described(base, resolution)
    (out / "shards").mkdir(parents=True)
    for start in range(0, samples, SHARD):
        path, kept = out / "shards" / f"part-{start // SHARD:05d}.tar", min(SHARD, samples - start)
        with TarWriter(str(path), encoder=False) as tar:
            for number in range(start, start + kept):
                described = json.dumps({**description, "person": number // PHOTOS}).encode()
                files = {"json": described, **_pictures(), **_arrays(rng, base, resolution, vision)}
                if hidden == "int8":
                    tokens = decode_npy(files.pop("clip_hidden.npy"))
                    files["clip_hidden.safetensors"] = encode_int8(quantise(tokens))
                tar.write({"__key__": f"part-{number:09d}", **dict(sorted(files.items()))})
        files = {path.name: {"bytes": path.stat().st_size, "sha256": ""}}
        manifest = Manifest(path.stem, "insightface", "plan", kept, kept, {}, [], files)
        path.with_suffix(".json").write_text(manifest.to_json())
    empty = save({"clip_hidden": np.zeros((257, vision["hidden_size"]), np.float16)})
    (out / "unconditional.safetensors").write_bytes(empty)
    fingerprint = {"bytes": len(empty), "sha256": hashlib.sha256(empty).hexdigest()}
    (out / "dataset.json").write_text(json.dumps({"files": {"unconditional.safetensors": fingerprint}}))


def _described(base: BaseSource, resolution: int) -> dict[str, Any]:
    """The json of a sample, but for the person."""
    square = (resolution, resolution)
    cuts = {crop: Fit(square, (0, 0), square) for crop in CROPS}
    targets = Targets(base.name, base.kind, vae_sha256(base.folder), text_sha256(base.folder), resolution, cuts)
    return {
        "text": "a photo of a person",
        "bbox": [300, 200, 700, 800],
        "kps": [[400, 400], [600, 400], [500, 500], [420, 600], [580, 600]],
        "crops": {crop: {"box": [0, 0, *size], "size": size} for crop, (*size, _) in CROPS.items()},
        "targets": json.loads(targets.to_json()),
    }


def _arrays(rng: np.random.Generator, base: BaseSource, resolution: int, vision: Mapping[str, Any]) -> dict[str, bytes]:
    shapes: dict[str, tuple[int, ...]] = {
        "clip.npy": (vision["projection_dim"],),
        "clip_hidden.npy": (257, vision["hidden_size"]),
        "text.npy": (77, base.text_width),
        **{f"latents.{crop}.npy": (8, resolution // 8, resolution // 8) for crop in CROPS},
    }
    if base.kind == "sdxl":
        config = json.loads((base.folder / "text_encoder_2" / "config.json").read_text())
        shapes["text_pooled.npy"] = (config["projection_dim"],)
    arrays = {suffix: encode_npy(rng.normal(size=shape).astype(np.float16)) for suffix, shape in shapes.items()}
    return {"arcface.npy": encode_npy(rng.normal(size=512).astype(np.float32)), **arrays}


def _write_photos(folder: Path, count: int) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(_pictures()["full.jpg"])
        (folder / f"{number}.face.jpg").write_bytes(_pictures()["face.jpg"])
        np.save(folder / f"{number}.npy", np.ones(512, np.float32))
