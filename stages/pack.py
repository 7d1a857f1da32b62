"""The sample's json: everything that is known of a kept row."""

import json
from collections.abc import Mapping
from typing import Any

from schemas.record import SCHEMA_VERSION
from schemas.shard import SUFFIXES, sample_files, sample_sha256
from stages.base import RowStage

_DIGITS = 4
"""Decimals of measurements in the json: a ten-thousandth of a pixel."""

REPEATED = (
    *("key", "part", "row", "url", "source_kind", "source_file", "text", "text_alternatives"),
    *("sha256", "n_bytes", "format", "width", "height"),
    *("bbox", "kps", "det_score", "face_px", "sharpness", "brightness", "roll_deg", "mask_share", "embedding_norm"),
    *("yaw_deg", "pitch_deg", "eye_px", "occlusion", "jpeg_quality"),
    *("ai_mark", "fiqa", "photo", "aesthetic", "nsfw_score"),
    *("punsafe", "pwatermark", "crops", "targets"),
)
"""Columns that the json repeats."""
_WHERE_KNOWN = ("source_file", "text_alternatives", "ai_mark", "fiqa", "photo", "aesthetic", "nsfw_score")
"""Keys that only samples have of which there is something to say."""


class Pack(RowStage):
    """Writes the json of a sample, and the hash of all its files; drops nothing."""

    name = "pack"
    reads = (*REPEATED, "further_caption", *(column for column in SUFFIXES.values() if column not in ("json", "txt")))
    writes = ("json", "txt", "sample_sha256")

    def row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """One record as UTF-8 JSON; `crops` and `targets` (where there is one) become objects.

        The fill colour of the embedded face is noted.
        """
        content = {name: _rounded(record[name]) for name in REPEATED}
        content["crops"] = json.loads(record["crops"])
        if content.pop("targets"):
            content["targets"] = json.loads(record["targets"])
        content["text"] = record["text"] or ""
        if record["further_caption"]:
            content["text_alternatives"] = [*(record["text_alternatives"] or []), record["further_caption"]]
        for name in _WHERE_KNOWN:
            if content[name] in (None, "", []):
                del content[name]
        content["fill"] = list(self.settings.segment.fill)
        content["schema_version"] = SCHEMA_VERSION
        written: dict[str, Any] = {"json": json.dumps(content, sort_keys=True, ensure_ascii=False).encode()}
        if self.settings.pack.layout == "plain":
            written["txt"] = content["text"].encode()
        return {**written, "sample_sha256": sample_sha256(sample_files({**record, **written}))}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    return [_rounded(item) for item in value] if isinstance(value, list) else value
