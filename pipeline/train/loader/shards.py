"""Finished shards as undecoded samples, as many as their manifests say; and the files of these as values.

Whatever is wrong with a sample is a CorruptShardError that names shard and key.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np

from pipeline.shared import tars
from pipeline.shared.files import AnyPath
from pipeline.shared.tars import Span, Wish
from schemas.arrays import Array, Image
from schemas.errors import CorruptShardError
from schemas.int8 import Quantised, decode_int8
from schemas.shard import INT8, Manifest, decode_npy
from schemas.targets import Targets

_END_OF_JPEG = b"\xff\xd9"
_REDUCED = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4}


class Shard(NamedTuple):
    folder: str
    """The dataset's folder, as it was given."""
    tar: AnyPath
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.shard


class Raw(NamedTuple):
    """The files of one sample, undecoded."""

    shard: Shard
    key: str
    files: dict[str, bytes | Span]
    """Suffix -> content."""

    def content(self, suffix: str) -> bytes:
        if suffix not in self.files:
            raise self.corrupt(suffix, "is missing")
        content = self.files[suffix]
        return content if isinstance(content, bytes) else content.read()

    def corrupt(self, suffix: str, reason: str) -> CorruptShardError:
        return CorruptShardError(f"{self.shard.tar}: {self.key}.{suffix} {reason}")


def samples(shard: Shard, start: int, stop: int, wish: Wish) -> Iterator[Raw]:
    """Samples [start, stop) of a shard, fewer where it ends before; its last one must be followed by nothing.

    Raises:
        CorruptShardError: too when there are more or fewer samples than the manifest says, or one without json.
    """
    count, kept = start, shard.manifest.kept
    stop = min(stop, kept)
    for key, files in tars.samples(shard.tar, start, None if stop == kept else stop, wish):
        if count == stop:
            raise CorruptShardError(f"{shard.tar}: holds more samples than the {kept} that its manifest says")
        raw = Raw(shard, key, files)
        if "json" not in files:
            raise raw.corrupt("json", "is missing")
        yield raw
        count += 1
    if count != stop:
        raise CorruptShardError(f"{shard.tar}: ends after {count} samples, its manifest says {kept}")


def meta(raw: Raw) -> dict[str, Any]:
    try:
        content = json.loads(raw.content("json"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise raw.corrupt("json", f"is no JSON object: {error}") from error
    return content


def targets(raw: Raw) -> Targets | None:
    """What the sample's precomputed targets were made by; None where nothing was precomputed."""
    entry = meta(raw).get("targets")
    try:
        return None if entry is None else Targets.from_object(entry)
    except CorruptShardError as error:
        raise raw.corrupt("json", f"is damaged: {error}") from error


def array(raw: Raw, suffix: str, shape: tuple[int, ...] | None = None) -> Array:
    """An npy file's finite float array, of this shape where one is given."""
    try:
        values = decode_npy(raw.content(suffix))
    except CorruptShardError as error:
        raise error if suffix not in raw.files else raw.corrupt(suffix, f"is damaged: {error}") from error
    if values.dtype not in (np.float16, np.float32):
        raise raw.corrupt(suffix, f"holds {values.dtype}, not float16 or float32")
    if shape is not None and values.shape != shape:
        raise raw.corrupt(suffix, f"has the shape {values.shape}, not {shape}")
    if values.dtype == np.float16:
        # numpy has no vector code for isfinite on float16; as integers, all ones in the exponent are inf and nan.
        is_finite = (values.view(np.uint16) & 0x7FFF).max(initial=0) < 0x7C00
    else:
        is_finite = np.isfinite(values).all()
    if not is_finite:
        raise raw.corrupt(suffix, "is not finite")
    return values


def moments(raw: Raw, suffix: str, size: tuple[int, int]) -> Array:
    """Mean and log-variance (8, h, w) of precomputed latents; shards of earlier releases hold the mean alone."""
    values = array(raw, suffix)
    if values.shape == (4, *size):
        return np.concatenate([values, np.full_like(values, -np.inf)])
    if values.shape != (8, *size):
        raise raw.corrupt(suffix, f"has the shape {values.shape}, not {(8, *size)}")
    return values


def features(raw: Raw, suffix: str, shape: tuple[int, ...] | None = None) -> Array | Quantised:
    """The finite features of an npy file, or of the int8 file that the sample has in its stead."""
    int8 = INT8.get(suffix, "")
    if suffix in raw.files or int8 not in raw.files:
        return array(raw, suffix, shape)
    try:
        stored = decode_int8(raw.content(int8))
    except CorruptShardError as error:
        raise raw.corrupt(int8, f"is damaged: {error}") from error
    if shape is not None and stored.shape != shape:
        raise raw.corrupt(int8, f"has the shape {stored.shape}, not {shape}")
    if not np.isfinite(stored.scale).all():
        raise raw.corrupt(int8, "is not finite")
    return stored


def picture(raw: Raw, suffix: str, size: tuple[int, int], wanted: tuple[int, int]) -> Image:
    """A JPEG's pixels (H, W, 3), RGB, which must be of `size`: width and height.

    A picture of at least twice the width and height that are `wanted` of it is decoded at 1/2 or 1/4, which costs half
    as much or less.
    """
    data = raw.content(suffix)
    scale = next((by for by in (4, 2) if size[0] >= by * wanted[0] and size[1] >= by * wanted[1]), 1)
    whole = data.rstrip(b"\0").endswith(_END_OF_JPEG)
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[scale]) if whole else None
    if bgr is None:
        raise raw.corrupt(suffix, "is no whole JPEG")
    if bgr.shape[:2] != (-(-size[1] // scale), -(-size[0] // scale)):
        raise raw.corrupt(suffix, f"is not of {size[0]} x {size[1]} pixels, as the json says")
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
