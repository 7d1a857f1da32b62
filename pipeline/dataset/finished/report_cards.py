"""What the report shows of a row: pictures, with boxes and points on photos and labels over faces, and a few facts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.shared.page import data_uri
from pipeline.shared.tars import Sample
from schemas.arrays import Array, Image, Labels
from schemas.columns import CROPS
from stages.filter import FROM_POINTS, POSE, from_points
from stages.pixels.images import decode_jpeg, decode_png, encode_jpeg, shrink

_QUALITY = 80
_BOX_COLOUR = (255, 214, 0)
_POINT_COLOURS = ((255, 64, 64), (64, 160, 255), (80, 220, 100), (255, 140, 0), (200, 90, 255))
_LABEL_WEIGHT = 0.55

# fmt: off
LABEL_COLOURS: dict[str, tuple[int, int, int]] = {
    "background": (40, 40, 40), "skin": (60, 130, 255), "left brow": (160, 90, 40), "right brow": (200, 140, 70),
    "left eye": (255, 255, 255), "right eye": (200, 255, 255), "glasses": (0, 200, 210), "left ear": (150, 190, 40),
    "right ear": (200, 230, 90), "earring": (255, 215, 0), "nose": (50, 190, 90), "mouth": (120, 0, 40),
    "upper lip": (230, 40, 80), "lower lip": (255, 110, 160), "neck": (120, 90, 230), "necklace": (255, 160, 20),
    "cloth": (127, 127, 127), "hair": (225, 60, 200), "hat": (255, 120, 60),
}
# fmt: on
"""CelebAMask label -> RGB, in BiSeNet order: the n-th is the colour of label n. No skin is blue: it shows on all."""


def reduced(image: Image, side: int) -> bytes:
    """(H, W, 3) RGB as a JPEG of at most `side` x `side` pixels."""
    return encode_jpeg(shrink(image, side), _QUALITY)


def marked(
    image: Image, side: int, frame: npt.ArrayLike, bbox: npt.ArrayLike | None, kps: npt.ArrayLike | None
) -> bytes:
    """A photo, reduced to a long side of `side` pixels, with its face box and five points drawn, as JPEG.

    `image` (H, W, 3), RGB, is the part `frame` (x0 y0 x1 y1) of the photo, at any scale. `frame`, `bbox` (4,) xyxy and
    `kps` (5, 2) are in pixels of the photo.
    """
    canvas = shrink(image, side).copy()
    corners = np.asarray(frame, np.float64).reshape(2, 2)
    scale = np.array([canvas.shape[1], canvas.shape[0]]) / (corners[1] - corners[0])
    thickness = max(1, round(max(canvas.shape) / 220))
    if bbox is not None:
        first, second = _pixels((np.reshape(bbox, (2, 2)) - corners[0]) * scale)
        cv2.rectangle(canvas, first, second, _BOX_COLOUR, thickness, cv2.LINE_AA)
    if kps is not None:
        points = _pixels((np.asarray(kps) - corners[0]) * scale)
        radius = int(np.clip(np.ptp(points, axis=0)[1] / 12, 1, 2 * thickness))
        for point, colour in zip(points, _POINT_COLOURS, strict=True):
            cv2.circle(canvas, point, radius, colour, cv2.FILLED, cv2.LINE_AA)
    return encode_jpeg(canvas, _QUALITY)


def _pixels(points: Array) -> list[tuple[int, int]]:
    """(N, 2) positions as OpenCV wants them; undefined ones, and those far away, are put where none sees them."""
    safe = np.clip(np.nan_to_num(points, nan=-1e4, posinf=1e4, neginf=-1e4), -1e4, 1e4)
    return [(int(x), int(y)) for x, y in safe.round()]


def masked(face: Image, mask: Labels, side: int) -> bytes:
    """A face (H, W, 3) RGB under the colours of its labels (H, W), as JPEG; unknown labels are black."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(LABEL_COLOURS)] = list(LABEL_COLOURS.values())
    return reduced(cv2.addWeighted(face, 1 - _LABEL_WEIGHT, colours[mask], _LABEL_WEIGHT, 0), side)


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
    title: str
    uri: str = ""
    absent: str = ""


@dataclass(frozen=True)
class Card:
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
        names = [name for name in CROPS if f"{name}.jpg" in sample.files]
        shown_px = {name: _PHOTO_PX if name == names[-1] else _CROP_PX for name in names}
        crops = {name: decode_jpeg(sample.files[f"{name}.jpg"], shown_px[name]) for name in names}
        face, mask = decode_jpeg(sample.files["face.jpg"]), decode_png(sample.files["mask.png"])
        described = content["crops"]
        if not crops:
            pictures = [Picture("photo", absent=described["full"]["absent"])]
        else:
            widest = names[-1]
            photo = marked(crops[widest], _PHOTO_PX, described[widest]["box"], content["bbox"], content["kps"])
            title = "photo" if widest == "full" else f"{widest} (no full: {described['full']['absent']})"
            pictures = [Picture(title, data_uri(photo))]
        pictures.append(Picture("face", data_uri(reduced(face, _CROP_PX))))
        pictures.append(Picture("mask", data_uri(masked(face, mask, _CROP_PX))))
        for name in ("portrait", "half"):
            if name in crops:
                title = f"{name} {described[name]['size'][0]}\N{NO-BREAK SPACE}px"
                pictures.append(Picture(title, data_uri(reduced(crops[name], _CROP_PX))))
            else:
                pictures.append(Picture(name, absent=_shortened(described[name]["absent"])))
        text, url = _shortened(content["text"]), _shortened(content["url"] or content.get("source_file"))
        labels = frozenset(np.unique(mask).tolist())
        facts, values = _facts(content)
        return Card(sample.key, text, url, facts, pictures, labels, values)

    @staticmethod
    def of_drop(record: Mapping[str, Any], thumbnail: bytes | None) -> "Card":
        """A dropped row from its ledger columns; its picture, if there is one, with box and points if known."""
        facts, values = _facts(record)
        card = Card(record["key"], "", _shortened(record["url"] or record.get("source_file")), facts, values=values)
        try:
            image = decode_jpeg(thumbnail or b"")
        except ValueError:  # thumbnails are disposable: a damaged one is as good as none
            return card
        height, width = image.shape[:2]
        frame = (0, 0, record["width"] or width, record["height"] or height)
        photo = marked(image, _DROP_PX, frame, record["bbox"], record["kps"])
        return replace(card, pictures=[Picture("", data_uri(photo))])


def _facts(record: Mapping[str, Any]) -> tuple[list[str], dict[str, float]]:
    """Sizes and scores as far as they were measured, in words, and as numbers those that are finite."""
    known = dict(record)
    if record.get("kps"):  # and the angles that the five points suggest
        values = from_points(np.array([record["kps"]], np.float64))[:, 0].tolist()
        known |= {name: value for name, value in zip(FROM_POINTS, values, strict=True) if np.isfinite(value)}
    known = {name: known[name] for name in _FACTS if known.get(name) is not None}
    size = [f"{record['width']} × {record['height']}"] if record["width"] and record["height"] else []
    # Formats other than JPEG have a quality of 100.
    words = [_FACTS[name].format(value) for name, value in known.items() if (name, value) != ("jpeg_quality", 100)]
    return size + words, {name: float(value) for name, value in known.items() if np.isfinite(value)}


def _shortened(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= _TEXT_LENGTH else f"{text[:_TEXT_LENGTH]}…"
