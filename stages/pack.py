"""The sample's json: everything that is known of a kept row."""

import json
from collections.abc import Mapping
from typing import Any

from schemas.record import SCHEMA_VERSION
from stages.base import RowStage

_DIGITS = 4
"""Decimals of measurements in the json: a ten-thousandth of a pixel."""


class Pack(RowStage):
    """Writes the json of a sample; drops nothing."""

    name = "pack"
    reads = (
        "key",
        "part",
        "row",
        "url",
        "text",
        "sha256",
        "n_bytes",
        "format",
        "width",
        "height",
        "bbox",
        "kps",
        "det_score",
        "face_px",
        "sharpness",
        "brightness",
        "roll_deg",
        "mask_share",
        "embedding_norm",
        "punsafe",
        "pwatermark",
        "crops",
        "targets",
    )
    writes = ("json",)

    def row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """One record as UTF-8 JSON; `crops` and `targets` (where there is one) become objects.

        The fill colour of the embedded face is noted.
        """
        content = {name: _rounded(value) for name, value in record.items()}
        content["crops"] = json.loads(record["crops"])
        if content.pop("targets"):
            content["targets"] = json.loads(record["targets"])
        content["text"] = record["text"] or ""
        content["fill"] = list(self.settings.segment.fill)
        content["schema_version"] = SCHEMA_VERSION
        return {"json": json.dumps(content, sort_keys=True, ensure_ascii=False).encode()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    return [_rounded(item) for item in value] if isinstance(value, list) else value
