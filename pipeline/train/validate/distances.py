"""What judges see of a picture, as points in a few spaces, and what the distances between these say.

In each space distances are those of a metric, so that `copy_paste` lies between -1 and 1.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from statistics import fmean

import cv2
import numpy as np

from pipeline.train.loader.faces import Face
from pipeline.train.validate.judge import Clip, IdJudge
from schemas.arcface import pose
from schemas.arrays import Doubles, Image

View = Mapping[str, Doubles]
"""Space -> the picture's point in it; a picture without a face has none in `id` and `pose`."""
_THUMBNAIL = (32, 32)
_ALIKE = 1e-3
"""Photos that are nearer to each other are one, so that nothing can be nearer to either."""


def _angle(a: Doubles, b: Doubles) -> float:
    return float(np.arccos(np.clip(a @ b, -1, 1)))


def _straight(a: Doubles, b: Doubles) -> float:
    return float(np.linalg.norm(a - b))


DISTANCES: dict[str, Callable[[Doubles, Doubles], float]] = {
    "id": _angle,
    "clip": _angle,
    "pose": _straight,
    "pixels": _straight,
}
"""`id`, `clip`: radians between unit vectors of the recogniser and of CLIP. `pose`: degrees, over yaw, pitch and roll.
`pixels`: root mean square between thumbnails of 32 x 32, 0 to 1, in which light and background weigh most."""


class Viewer:
    def __init__(
        self, judge: str, clip: str, device: str = "cpu", options: Sequence[str] = ("watch.judge", "watch.clip")
    ) -> None:
        """Load those that are not "": an insightface pack, and a whole CLIP for `device`; `options` gave them.

        Raises:
            WeightsError: when the pack or CLIP's folder is not there.
        """
        self.judge = IdJudge(judge, options[0]) if judge else None
        self.clip = Clip(clip, device, options[1]) if clip else None

    def image(self, image: Image) -> View:
        """A picture (H, W, 3), RGB."""
        small = cv2.resize(image, _THUMBNAIL, interpolation=cv2.INTER_AREA)
        view = {"pixels": small.ravel() / 255 / np.sqrt(small.size)}
        if self.clip is not None:
            view["clip"] = self.clip.image(image)
        look = self.judge.look(image) if self.judge is not None else None
        if look is not None:
            view["id"] = look.embedding.astype(np.float64)
            angles = np.concatenate(pose(look.kps[None].astype(np.float64)))
            if np.isfinite(angles).all():
                view["pose"] = angles
        return view

    def photos(self, face: Face) -> list[View]:
        """Photos of a person, the condition's first; an aligned face tells whose it is where the judge sees none."""
        views: list[View] = []
        for photo in (face.photo, *face.others):
            view = self.image(photo.crop)
            if self.judge is not None and "id" not in view:
                view = {**view, "id": self.judge.embed(photo.face).astype(np.float64)}
            views.append(view)
        return views


def copy_paste(image: View, condition: View, others: Sequence[View]) -> dict[str, float]:
    """Space -> how much nearer an image is to its condition photo than to the person's other photos, -1 to 1.

    (sum of d(image, other) - d(image, condition)) / (sum of d(condition, other)), over the other photos: 1 is the
    condition photo itself, 0 is as near to it as to the others, and the only other photo itself is -1. With one other
    photo and angles between ID vectors it is the measure of WithAnyone (arXiv 2510.14975), that photo as its target.
    """
    scores = {}
    for space, distance in DISTANCES.items():
        there = [other[space] for other in others if space in other]
        if there and space in image and space in condition:
            between = [distance(condition[space], other) for other in there]
            nearer = [distance(image[space], other) - distance(image[space], condition[space]) for other in there]
            if fmean(between) > _ALIKE:
                scores[space] = sum(nearer) / sum(between)
    return scores


def spread(views: Sequence[View]) -> dict[str, float]:
    """Space -> mean distance between two of the pictures, where two have a point in it."""
    points = {space: [view[space] for view in views if space in view] for space in DISTANCES}
    return {
        space: fmean(DISTANCES[space](a, b) for a, b in combinations(some, 2))
        for space, some in points.items()
        if len(some) > 1
    }


def scale(persons: Sequence[Sequence[View]]) -> tuple[list[list[float]], list[list[float]]]:
    """ID similarity of real photos, for each person: between two of the person, and to the first of each stranger."""
    ids: list[list[Doubles]] = [[view["id"] for view in views if "id" in view] for views in persons]
    same = [[float(a @ b) for a, b in combinations(own, 2)] for own in ids]
    strangers = [[float(own[0] @ other[0]) for other in ids if own and other and other is not own] for own in ids]
    return same, strangers
