"""Crop: the photo at several face proportions. Nothing is upsampled; a crop that the photo cannot give is absent."""

import json
from collections.abc import Mapping
from typing import Any

from schemas.columns import CROPS
from stages.base import RowStage
from stages.pixels.geometry import Box, crop_box
from stages.pixels.images import encode_jpeg, photo_of, shrink

_FACE_CENTRE = {"portrait": 0.45, "half": 0.28}
"""Wished height of the face's centre, share of the crop from the top: room for hair, then for the body."""

_DIGITS = 4


class Crop(RowStage):
    """Cuts portrait and half (squares around the face) and full (the whole photo)."""

    name = "crop"
    reads = ("image", "sha256", "bbox")
    writes = ("portrait", "half", "full", "crops", "crops_made")

    def row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        settings = self.settings.crop
        image, bbox = photo_of(record), record["bbox"]
        (height, width), face_height = image.shape[:2], bbox[3] - bbox[1]
        written: dict[str, Any] = {}
        crops: dict[str, Any] = {}
        for name in CROPS:
            if name == "full":
                box = self._whole(face_height, width, height)
            else:
                framing = getattr(settings.face_share, name), settings.tolerance, _FACE_CENTRE[name], settings.size
                box = crop_box(bbox, width, height, *framing)
            if isinstance(box, str):
                crops[name] = {"absent": box}
                continue
            longest = settings.max_long_side if name == "full" else settings.max_size
            crop = shrink(image[box.y0 : box.y1, box.x0 : box.x1], longest)
            crops[name] = {
                "box": list(box),
                "size": [crop.shape[1], crop.shape[0]],
                "face_share": round(face_height / (box.y1 - box.y0), _DIGITS),
            }
            written[name] = encode_jpeg(crop, settings.jpeg_quality)
        return {**written, "crops": json.dumps(crops, separators=(",", ":")), "crops_made": list(written)}

    def _whole(self, face_height: float, width: int, height: int) -> Box | str:
        """The box of the whole photo, or why it is no `full`, as a sentence."""
        crop = self.settings.crop
        share = face_height / height
        if share > crop.face_share.full:
            return f"the face fills {share:.2f} of the photo's height, the most is {crop.face_share.full:.2f}"
        short = round(min(width, height) * min(1, crop.max_long_side / max(width, height)))
        if short < crop.size:
            return f"the photo is too narrow: its short side would have {short} px, the least is {crop.size}"
        return Box(0, 0, width, height)
