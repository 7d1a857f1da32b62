"""Crop: the photo at several face proportions. Nothing is upsampled; a crop that the photo cannot give is absent."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from stages.base import RowStage
from stages.models.backends import Image
from stages.pixels.geometry import Box, Framing, crop_box
from stages.pixels.images import encode_jpeg, photo, shrink

_FACE_CENTRE = {"portrait": 0.45, "half": 0.28}
"""Wished height of the face's centre, share of the crop from the top: room for hair, then for the body."""

_DIGITS = 4


class Crop(RowStage):
    """Cuts portrait and half (squares around the face) and full (the whole photo)."""

    name: ClassVar[str] = "crop"
    reads: ClassVar[tuple[str, ...]] = ("image", "sha256", "bbox")
    writes: ClassVar[tuple[str, ...]] = ("portrait", "half", "full", "crops")

    def row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Cut the crops of one photo."""
        image, bbox = photo(record["sha256"], record["image"]), record["bbox"]
        height, width = image.shape[:2]
        boxes = {name: self._square(name, bbox, width, height) for name in _FACE_CENTRE}
        boxes["full"] = self._whole(bbox, width, height)
        return self._cut(image, bbox[3] - bbox[1], boxes)

    def _square(self, name: str, bbox: list[float], width: int, height: int) -> Box | str:
        crop = self.settings.crop
        share = getattr(crop.face_share, name)
        return crop_box(bbox, width, height, Framing(share, crop.tolerance, _FACE_CENTRE[name], crop.size))

    def _whole(self, bbox: list[float], width: int, height: int) -> Box | str:
        crop = self.settings.crop
        share = (bbox[3] - bbox[1]) / height
        if share > crop.face_share.full:
            return f"the face fills {share:.2f} of the photo's height, the most is {crop.face_share.full:.2f}"
        short = round(min(width, height) * min(1, crop.max_long_side / max(width, height)))
        if short < crop.size:
            return f"the photo is too narrow: its short side would have {short} px, the least is {crop.size}"
        return Box(0, 0, width, height)

    def _cut(self, image: Image, face_height: float, boxes: dict[str, Box | str]) -> dict[str, Any]:
        written: dict[str, Any] = {}
        crops: dict[str, Any] = {}
        for name, box in boxes.items():
            if isinstance(box, str):
                crops[name] = {"absent": box}
                continue
            crop = shrink(image[box.y0 : box.y1, box.x0 : box.x1], self._longest(name))
            share = round(face_height / (box.y1 - box.y0), _DIGITS)
            crops[name] = {"box": list(box), "size": [crop.shape[1], crop.shape[0]], "face_share": share}
            written[name] = encode_jpeg(crop, self.settings.crop.jpeg_quality)
        return {**written, "crops": json.dumps(crops, separators=(",", ":"))}

    def _longest(self, name: str) -> int:
        crop = self.settings.crop
        return crop.max_long_side if name == "full" else crop.max_size
