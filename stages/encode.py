"""Encode: latents of the crops and embeddings of the caption, so that training needs neither VAE nor text encoder.

Off unless `encode` wants some: else nothing is loaded and all its columns are null.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import cv2

from schemas.arrays import Halves, Image
from schemas.buckets import Fit, Size, bucketed, buckets, in_crop
from schemas.columns import CROPS
from schemas.errors import PlanError
from schemas.shard import encode_npy
from schemas.targets import Targets
from stages.base import BatchStage
from stages.models.encoders import TextEncoder, Vae
from stages.pixels.images import decode_jpeg
from stages.runtime import Runtime
from stages.settings import Settings

_GPU_BATCH = 16

_Columns = dict[str, Halves]


class Encode(BatchStage):
    """Encodes the crops and the caption by the encoders of the base that `settings.encode` names; drops nothing."""

    name = "encode"
    reads = ("text", "bbox", "portrait", "half", "full", "crops")
    writes = ("latents_portrait", "latents_half", "latents_full", "text_embeds", "text_pooled", "targets")

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        super().__init__(settings, runtime)
        encode, source = settings.encode, runtime.encoders
        if (encode.latents or encode.text) and source is None:
            raise PlanError("encode needs the encoders of a base: make_plan finds them, and adds them to the runtime.")
        self._source = source
        self._sizes = buckets(encode.resolution)
        self._vae = Vae(source, runtime.device) if source and encode.latents else None
        self._text = TextEncoder(source, runtime.device) if source and encode.text else None
        if runtime.device == "cuda":
            self.batch = _GPU_BATCH

    def given(self, record: Mapping[str, Any]) -> tuple[dict[str, Fit], list[Image], str]:
        """How each crop is cut, what is cut out, and the caption."""
        fits: dict[str, Fit] = {}
        images = []
        for crop in CROPS if self._vae is not None else ():
            data = record[crop]
            if data is not None:
                image = decode_jpeg(data)
                fits[crop] = fit_crop(crop, image, record, self._sizes)
                images.append(cut(image, fits[crop]))
        return fits, images, record["text"] or ""

    def computed(
        self, given: Sequence[tuple[dict[str, Fit], list[Image], str]]
    ) -> list[tuple[dict[str, Fit], _Columns]]:
        latents = iter(self._vae.encode([image for _, images, _ in given for image in images]) if self._vae else ())
        texts = self._text.encode([text for _, _, text in given]) if self._text else [{} for _ in given]
        return [
            (fits, {**{f"latents_{crop}": next(latents) for crop in fits}, **embeds})
            for (fits, _, _), embeds in zip(given, texts, strict=True)
        ]

    def written(self, record: Mapping[str, Any], output: tuple[dict[str, Fit], _Columns]) -> dict[str, Any]:
        (fits, arrays), base = output, self._source
        if base is None:
            return {}
        resolution = self.settings.encode.resolution
        targets = Targets(base.name, base.kind, base.vae_sha256, base.text_sha256, resolution, fits)
        return {**{name: encode_npy(array) for name, array in arrays.items()}, "targets": targets.to_json()}


def fit_crop(crop: str, image: Image, record: Mapping[str, Any], sizes: tuple[Size, ...]) -> Fit:
    """How a crop is scaled and cut, by a record's `bbox` (pixels of the photo) and `crops` of the stages before."""
    size = image.shape[1], image.shape[0]
    face = in_crop(record["bbox"], json.loads(record["crops"])[crop]["box"], size)
    return bucketed(crop, size, face, sizes)


def cut(image: Image, fit: Fit) -> Image:
    """The pixels of a fit: reduced by area, then cut; (height, width, 3) RGB."""
    scaled = image
    if (image.shape[1], image.shape[0]) != fit.resized:
        scaled = cv2.resize(image, fit.resized, interpolation=cv2.INTER_AREA)
    (left, top), (width, height) = fit.offset, fit.size
    return scaled[top : top + height, left : left + width]
