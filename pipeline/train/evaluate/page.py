"""evaluation.html: what was seen, on its scale, and the images beside the photos. One file that needs nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2

from pipeline.shared.atomic import write_atomically
from pipeline.shared.page import data_uri, rendered
from schemas.arrays import Image

_SIDE, _QUALITY = 256, 80
SHOWN = 600
"""Pictures on the page, about 8 MB as text; those of further persons are in images/ alone."""
TITLES = {
    "faces_found": "Images that show a face",
    "id_similarity": "ID similarity to the condition photo",
    "id_to_others": "ID similarity to the other photos",
    "copy_paste_id": "Copy-paste by the ID vector",
    "copy_paste_pose": "Copy-paste by the pose",
    "copy_paste_pixels": "Copy-paste by the pixels",
    "copy_paste_clip": "Copy-paste by CLIP",
    "clip_similarity": "CLIP similarity to the prompt",
    "diversity_pose": "Pose difference of a person's images",
    "diversity_pixels": "Pixel difference within a prompt",
    "diversity_clip": "CLIP difference within a prompt",
}
"""Name in `results` -> what it is."""
_BESIDE = {
    "id_similarity": {"id_same_person": "two real photos of a person", "id_strangers": "strangers"},
    "id_to_others": {"id_same_person": "two real photos of a person", "id_strangers": "strangers"},
    "clip_similarity": {"clip_similarity_without_adapter": "without the adapter"},
    **{f"diversity_{space}": {f"diversity_{space}": "a person's real photos"} for space in ("pose", "pixels", "clip")},
}
"""Name in `results` -> names in `levels` that it is to be compared with, and what these are."""
_SCALES: dict[str, tuple[float, float, dict[str, str]]] = {
    "ID similarity": (
        -0.2,
        1.0,
        {
            "id_strangers": "strangers",
            "id_similarity": "images, to the condition photo",
            "id_to_others": "images, to the person's other photos",
            "id_same_person": "two real photos of a person",
        },
    ),
    "Copy-paste": (-1.0, 1.0, {name: title for name, title in TITLES.items() if name.startswith("copy_paste")}),
}
"""What is drawn on one scale: its ends, and names in `results` or `levels`."""
_ENDS = ("mean", "low", "high", "p5", "p95")
_SHORT = {"id_similarity": "ID", "id_to_others": "ID of others", "copy_paste_id": "copied", "clip_similarity": "CLIP"}


def words(name: str, value: float) -> str:
    if name == "faces_found":
        return f"{100 * value:.0f} %"
    return f"{value:.1f}°" if name == "diversity_pose" else f"{value:.2f}"


def table(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Title, mean, interval, and what it is to be compared with, of all that is known."""
    lines = []
    for name, one in result["results"].items():
        interval = f"{words(name, one['low'])} to {words(name, one['high'])}" if "low" in one else ""
        beside = [
            f"{what} {words(name, result['levels'][level]['mean'])}"
            for level, what in _BESIDE.get(name, {}).items()
            if level in result["levels"]
        ]
        lines.append((TITLES[name], words(name, one["mean"]), interval, ", ".join(beside)))
    return lines


def title(prompt: str, score: Mapping[str, float]) -> str:
    known = [f"{short} {score[name]:.2f}" for name, short in _SHORT.items() if name in score]
    return " · ".join([prompt, *(["no face"] if score.get("faces_found") == 0 else []), *known])


def reduced(picture: Image, title: str) -> dict[str, str]:
    factor = min(_SIDE / max(picture.shape[:2]), 1)
    small = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1].tobytes()
    return {"uri": data_uri(jpeg), "title": title}


def write_page(path: Path, result: Mapping[str, Any], persons: Sequence[Mapping[str, Any]]) -> None:
    """Write the page of what evaluation.json says, with the pictures of the first persons."""
    scales, known = {}, {**result["results"], **result["levels"]}
    for title, (low, high, lines) in _SCALES.items():
        scales[title] = {
            "ends": (low, high),
            "lines": {
                what: {end: 100 * (min(max(one[end], low), high) - low) / (high - low) for end in _ENDS if end in one}
                | {"value": one["mean"], "is_real": name in result["levels"]}
                for name, what in lines.items()
                if (one := known.get(name))
            },
        }
    page = rendered(
        Path(__file__).with_name("evaluation"),
        data=None,
        result=result,
        table=table(result),
        scales={title: one for title, one in scales.items() if one["lines"]},
        persons=persons,
        titles=TITLES,
        words=words,
    )
    write_atomically(path, page)
