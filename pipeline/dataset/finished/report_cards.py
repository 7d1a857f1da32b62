"""What the report shows of one row: pictures, and a few facts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.dataset.finished.report_numbers import CROPS
from pipeline.dataset.finished.report_pictures import marked, masked, reduced
from pipeline.shared.page import data_uri
from pipeline.shared.tars import Sample
from stages.filter import FROM_POINTS, POSE, from_points
from stages.pixels.images import decode_jpeg, decode_png

_PHOTO_PX, _CROP_PX, _DROP_PX = 448, 192, 192
_TEXT_LENGTH = 300
_FACTS = {
    "face_px": "face {:.0f} px",
    "n_faces": "faces {}",
    "det_score": "score {:.2f}",
    "second_score": "second {:.2f}",
    "sharpness": "sharpness {:.0f}",
    "brightness": "brightness {:.0f}",
    **{angle: f"{angle} {{:z.0f}}°" for angle in POSE},
    "eye_px": "eyes {:.0f} px",
    "jpeg_quality": "JPEG {:.0f}",
    "mask_share": "mask {:.0%}",
    "occlusion": "covered {:.0%}",
    "embedding_norm": "norm {:.1f}",
    "fiqa": "quality {:.2f}",
    "photo": "photo {:.0%}",
    "aesthetic": "aesthetic {:.1f}",
    "nsfw_score": "NSFW {:.0%}",
}


@dataclass(frozen=True)
class Picture:
    """One picture of a card, or why it is absent."""

    title: str
    uri: str = ""
    absent: str = ""


@dataclass(frozen=True)
class Card:
    """One row of the dataset as the page shows it."""

    key: str
    text: str
    url: str
    """Or the name of its file, where it was not fetched."""
    facts: list[str]
    pictures: list[Picture] = field(default_factory=list)
    labels: frozenset[int] = frozenset()
    """Labels that occur in its mask."""
    values: dict[str, float] = field(default_factory=dict)
    """Measurements to order by."""
    row: list[float] = field(default_factory=list)
    """What thresholds judge, as report_explorer.row_data has it."""
    number: int = 0
    """In the page."""

    @property
    def length(self) -> int:
        """Characters of its pictures."""
        return sum(len(picture.uri) for picture in self.pictures)

    @staticmethod
    def of_sample(sample: Sample, content: Mapping[str, Any]) -> "Card":
        """The widest crop with box and points, the face, its labels, and the squares; `content` is its json.

        Raises one of DECODER_ERRORS when it is damaged.
        """
        crops = {name: decode_jpeg(sample.files[f"{name}.jpg"]) for name in CROPS if f"{name}.jpg" in sample.files}
        face, mask = decode_jpeg(sample.files["face.jpg"]), decode_png(sample.files["mask.png"])
        described = content["crops"]
        if not crops:
            pictures = [Picture("photo", absent=described["full"]["absent"])]
        else:
            widest = list(crops)[-1]
            photo = marked(crops[widest], _PHOTO_PX, described[widest]["box"], content["bbox"], content["kps"])
            title = "photo" if widest == "full" else f"{widest} (no full: {described['full']['absent']})"
            pictures = [Picture(title, data_uri(photo))]
        pictures.append(Picture("face", data_uri(reduced(face, _CROP_PX))))
        pictures.append(Picture("mask", data_uri(masked(face, mask, _CROP_PX))))
        for name in ("portrait", "half"):
            if name in crops:
                title = f"{name} {crops[name].shape[1]} px"
                pictures.append(Picture(title, data_uri(reduced(crops[name], _CROP_PX))))
            else:
                pictures.append(Picture(name, absent=_shortened(described[name]["absent"])))
        text, url = _shortened(content["text"]), _shortened(content["url"] or content.get("source_file"))
        labels = frozenset(np.unique(mask).tolist())
        return Card(sample.key, text, url, _facts(content), pictures, labels, _values(content))

    @staticmethod
    def of_drop(record: Mapping[str, Any], thumbnail: bytes | None) -> "Card":
        """A dropped row from its ledger columns; its picture, if there is one, with box and points if known."""
        card = Card(
            record["key"],
            "",
            _shortened(record["url"] or record.get("source_file")),
            _facts(record),
            values=_values(record),
        )
        try:
            image = decode_jpeg(thumbnail or b"")
        except ValueError:  # thumbnails are disposable: a damaged one is as good as none
            return card
        height, width = image.shape[:2]
        frame = (0, 0, record["width"] or width, record["height"] or height)
        photo = marked(image, _DROP_PX, frame, record["bbox"], record["kps"])
        return replace(card, pictures=[Picture("", data_uri(photo))])


def _facts(record: Mapping[str, Any]) -> list[str]:
    """Sizes and scores in words, as far as they were measured."""
    record = _posed(record)
    size = [f"{record['width']} × {record['height']}"] if record["width"] and record["height"] else []
    if record.get("jpeg_quality") == 100:  # other formats than JPEG count as that
        del record["jpeg_quality"]
    return size + [text.format(record[name]) for name, text in _FACTS.items() if record.get(name) is not None]


def _posed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the angles that its five points suggest."""
    if not record.get("kps"):
        return dict(record)
    values = from_points(np.array([record["kps"]], np.float64))[:, 0].tolist()
    return {**record, **{name: value for name, value in zip(FROM_POINTS, values, strict=True) if np.isfinite(value)}}


def _values(record: Mapping[str, Any]) -> dict[str, float]:
    """Those of the facts that are finite numbers."""
    record = _posed(record)
    known = {name: float(record[name]) for name in _FACTS if isinstance(record.get(name), int | float)}
    return {name: value for name, value in known.items() if np.isfinite(value)}


def _shortened(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= _TEXT_LENGTH else f"{text[:_TEXT_LENGTH]}…"
