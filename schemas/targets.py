"""What a sample's precomputed latents and text embeddings were made by: `targets` in its json.

Shared by whoever encodes and whoever trains: latents of another VAE are as good as noise, so both name the weights by
their hashes.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from schemas.buckets import Fit
from schemas.digest import sha256_of_file
from schemas.errors import CorruptShardError, WeightsError

BaseKind = Literal["sd15", "sdxl"]
"""Layout of a base model: Stable Diffusion 1.5's, or SDXL's (two text encoders, micro-conditioning)."""

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Targets:
    """What encoded a sample, and how each of its pictures was cut for it."""

    base: str
    """Name of the base, for people; the hashes decide."""
    kind: str
    """sd15 or sdxl."""
    vae_sha256: str
    text_sha256: str
    resolution: int
    """Side of a square picture, pixels."""
    latents: dict[str, Fit]
    """portrait, half, full: those that have latents."""

    def to_json(self) -> str:
        cuts = {crop: fit._asdict() for crop, fit in self.latents.items()}
        return json.dumps({**asdict(self), "latents": cuts}, separators=(",", ":"), sort_keys=True)

    @staticmethod
    def from_object(value: Any) -> "Targets":
        """Read `targets` of a sample's parsed json; a CorruptShardError when it is something else."""
        try:
            fields: dict[str, Any] = {name: value[name] for name in Targets.__dataclass_fields__}
            fields["latents"] = {crop: _fit(entry) for crop, entry in fields["latents"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptShardError(f"targets cannot be read: {type(error).__name__}: {error}") from error
        words = (fields["base"], fields["kind"], fields["vae_sha256"], fields["text_sha256"])
        if not all(isinstance(word, str) for word in words) or type(fields["resolution"]) is not int:
            raise CorruptShardError("targets cannot be read: a field has another type")
        return Targets(**fields)


def _fit(entry: Any) -> Fit:
    pairs = [tuple(entry[name]) for name in Fit._fields]
    if not all(len(pair) == 2 and all(type(side) is int and side >= 0 for side in pair) for pair in pairs):
        raise ValueError("a cut is not made of whole numbers")
    fit = Fit(*pairs)
    whole = zip(fit.resized, fit.offset, fit.size, strict=True)
    if not all(cut > 0 and start + cut <= side for side, start, cut in whole):
        raise ValueError("a cut lies outside its picture")
    return fit


def variant_of(part: Path) -> str | None:
    """`fp16` where the folder of a model has weights in half precision alone, None where there are others.

    Named `*.fp16.safetensors`, or `*.fp16-00001-of-…`, as diffusers and transformers do.
    """
    files = list(part.glob("*.safetensors"))
    return "fp16" if any(".fp16" in file.name for file in files) and all("." in file.stem for file in files) else None


def vae_sha256(folder: Path) -> str:
    """sha256 of the VAE's weights in a diffusers folder, hex; a WeightsError when they are not there."""
    return _sha256(folder / "vae", "diffusion_pytorch_model")


def text_sha256(folder: Path) -> str:
    """sha256 of the text encoder's weights in a diffusers folder, hex; of both, joined by `+`, where there are two.

    Raises:
        WeightsError: when they are not there.
    """
    parts = [folder / name for name in _TEXT_ENCODERS if (folder / name).is_dir()]
    return "+".join(_sha256(part, "model") for part in parts or [folder / _TEXT_ENCODERS[0]])


def _sha256(part: Path, stem: str) -> str:
    variant = variant_of(part)
    path = part / f"{stem}.{variant}.safetensors" if variant else part / f"{stem}.safetensors"
    try:
        return sha256_of_file(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}): fetch the base's safetensors files.") from error
