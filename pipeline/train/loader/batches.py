"""Batches: decoded samples of one size as tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from pipeline.train.loader.plan_sample import Planned
from pipeline.train.loader.reading import Reading, stored_row
from pipeline.train.loader.shards import array, moments, picture
from schemas.arrays import Array, Image
from schemas.buckets import PIXELS_PER_LATENT
from schemas.int8 import GROUP, Quantised


class MixedTokens(NamedTuple):
    """Features (B, T, D), each sample's in the form that it was stored in; `float` gives them as one tensor."""

    plain: Tensor
    """(B - N, T, D) float16: of samples of float16 shards, and of "no face"; may be none."""
    int8: Tensor
    """(N, T, D)."""
    scale: Tensor
    """(N, T, ceil(D / GROUP)) float16."""
    order: Tensor
    """(B,) int64: where each sample lies in `plain` followed by `int8`."""

    def float(self) -> Tensor:
        """(B, T, D) float32, computed on the device that all of it lies on."""
        steps = self.scale.float().repeat_interleave(GROUP, -1)[..., : self.int8.shape[-1]]
        return torch.cat([self.plain.float(), self.int8 * steps])[self.order]


def mixed(rows: Sequence[Array | Quantised]) -> MixedTokens:
    """Of samples' features (T, D), at least one of which is in int8."""
    is_int8 = np.array([isinstance(row, Quantised) for row in rows])
    plain = [row for row in rows if not isinstance(row, Quantised)]
    quantised = [row for row in rows if isinstance(row, Quantised)]
    return MixedTokens(
        torch.from_numpy(np.array(plain, np.float16).reshape(len(plain), *quantised[0].shape)),
        torch.from_numpy(np.stack([row.int8 for row in quantised])),
        torch.from_numpy(np.stack([row.scale for row in quantised])),
        torch.from_numpy(is_int8.argsort(kind="stable").argsort()),
    )


class Position(NamedTuple):
    worker: int
    epoch: int
    batch: int
    """Number of the batch in the worker's epoch, from 0."""


@dataclass(frozen=True)
class Batch:
    """B samples of one target size."""

    keys: tuple[str, ...]
    crops: tuple[str, ...]
    """portrait, half or full: which one the target is."""
    pixels: Tensor | None
    """(B, 3, H, W) float32 in [-1, 1], RGB; None with latents."""
    latents: Tensor | None
    """(B, 8, H / 8, W / 8) float16: mean and log-variance of the scaled latents; None with pixels."""
    captions: tuple[str, ...]
    """As in the shards, also where uncond_text is set."""
    text_embeds: Tensor | None
    """(B, 77, C) float16 of the captions, where the shards hold them."""
    text_pooled: Tensor | None
    """(B, P) float16, SDXL only."""
    condition: dict[str, Tensor | MixedTokens]
    """Role -> features: arcface (B, 512), or (B, F, 512) of F photos each, and pooled (B, P) float32, hidden
    (B, 257, D) float16, or MixedTokens where shards hold any in int8; where uncond_image is set, those of "no face"."""
    uncond_image: Tensor
    """(B,) bool."""
    uncond_text: Tensor
    """(B,) bool; the caller replaces the text there."""
    size_ids: Tensor
    """(B, 6) float32, SDXL's micro-conditioning: height and width of the crop's picture, top and left of the cut in the
    scaled picture, mirrored where the target is, height and width of the target; pixels."""
    kps: Tensor
    """(B, 5, 2) float32: x y of the face's points in pixels of the target."""
    position: Position

    def __len__(self) -> int:
        return len(self.keys)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        condition = {
            role: MixedTokens(*map(change, features)) if isinstance(features, MixedTokens) else change(features)
            for role, features in self.condition.items()
        }
        return replace(self, **tensors, condition=condition)  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> "Batch":
        """The same with its tensors on a device; asynchronous from pinned memory."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same with its tensors in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._mapped(lambda tensor: tensor.pin_memory())


def collate(group: Sequence[Planned], reading: Reading, position: Position) -> Batch:
    """Decode samples whose targets have one size, and whose conditions are of equally many photos."""
    width, height = group[0].fit.size
    pixels = latents = None
    if reading.latents:
        size = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
        latents = _stacked([moments(one.raw, reading.target(one.crop), size) for one in group], np.float16)
    else:
        pixels = torch.empty((len(group), 3, height, width))
        for one, out in zip(group, pixels.numpy(), strict=True):
            image = target_pixels(one, reading.target(one.crop))
            np.multiply(image.transpose(2, 0, 1), np.float32(1 / 127.5), out=out)
            out -= 1
    texts = {
        suffix: _stacked([array(one.raw, suffix, shape) for one in group], np.float16)
        for suffix, shape in reading.text.items()
    }
    condition: dict[str, Tensor | MixedTokens] = {}
    for role in reading.features.files[0]:
        rows = [_condition(one, role, reading) for one in group]
        arrays = [row for row in rows if not isinstance(row, Quantised)]
        if len(arrays) == len(rows):
            condition[role] = _stacked(arrays, np.float16 if role == "hidden" else np.float32)
        else:
            condition[role] = mixed(rows)
    sizes = [(*one.size[::-1], one.fit.offset[1], _left(one), height, width) for one in group]
    return Batch(
        keys=tuple(one.raw.key for one in group),
        crops=tuple(one.crop for one in group),
        pixels=pixels,
        latents=latents,
        captions=tuple(one.caption for one in group),
        text_embeds=texts.get("text.npy"),
        text_pooled=texts.get("text_pooled.npy"),
        condition=condition,
        uncond_image=torch.tensor([one.uncond_image for one in group]),
        uncond_text=torch.tensor([one.uncond_text for one in group]),
        size_ids=torch.tensor(sizes, dtype=torch.float32),
        kps=torch.from_numpy(np.stack([one.kps for one in group])),
        position=position,
    )


def _condition(planned: Planned, role: str, reading: Reading) -> Array | Quantised:
    """The features of a sample's role, those of several photos side by side.

    Features of another photo are mirrored with the target: two mirrored photos are two photos of the mirrored person,
    whose parting is on the same side in both.
    """
    sources = planned.id_from if role == "arcface" else (planned.image_from,)
    if planned.uncond_image:
        rows: list[Any] = [reading.features.unconditional[role]] * len(sources)
    else:
        file = reading.condition_file(role, plain=planned.plain, mirror=planned.mirror)
        rows = [stored_row(source, role, *file) for source in sources]
    return rows[0] if len(rows) == 1 else np.stack(rows)


def _left(planned: Planned) -> int:
    """Columns that are missing on the left of a target: of a mirrored one those that were cut off on the right."""
    resized, (left, _), (width, _) = planned.fit
    return resized[0] - width - left if planned.mirror else left


def _stacked(rows: Sequence[Array], dtype: type[np.floating[Any]]) -> Tensor:
    """One copy, from the files' bytes to the batch."""
    out = np.empty((len(rows), *rows[0].shape), dtype)
    for target, values in zip(out, rows, strict=True):
        target[...] = values
    return torch.from_numpy(out)


def target_pixels(planned: Planned, suffix: str) -> Image:
    """The target (H, W, 3), RGB: decoded, scaled, cut, mirrored, recoloured."""
    resized, (left, top), (width, height) = planned.fit
    image: Array = picture(planned.raw, suffix, planned.size, resized)
    if image.shape[1::-1] != resized:
        shrinks = image.shape[1] > resized[0] or image.shape[0] > resized[1]
        image = cv2.resize(image, resized, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    image = image[top : top + height, left : left + width]
    if planned.mirror:
        image = cv2.flip(image, 1)
    if planned.colour:
        functional, (brightness, contrast, saturation) = albumentations().augmentations.functional, planned.colour
        image = functional.adjust_brightness_torchvision(np.ascontiguousarray(image), brightness)
        image = functional.adjust_contrast_torchvision(image, contrast)
        image = functional.adjust_saturation_torchvision(image, saturation)
    return image


def albumentations() -> Any:
    """The library, which is slow to load: for changes of colours alone."""
    import albumentations

    return albumentations
