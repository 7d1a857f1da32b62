"""What is measured on: the pack and the labelled photos of FACESHARDS_DATA, and web-like photos composed of them.

For --smoke, or where there are none, photos are composed of pictures that come with scikit-image; for --smoke a pack
with random weights is made as well.
"""

import csv
import os
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import composed
import inference_models
import numpy as np
import skimage
from PIL import Image as Pillow

GROUNDS = (
    *("brick", "cell", "clock_motion", "coins", "grass", "gravel", "hubble_deep_field", "ihc", "moon"),
    *("motorcycle_left", "page", "rocket", "text"),
)
ASTRONAUT = [178.0, 66.0, 274.0, 196.0]
"""Box of the face in skimage's picture of that name."""
FACES = (0,) * 8 + (1,) + (0,) * 8 + (1,) + (0,) * 6 + (2,)
"""Of the photos on the web 12 % show a face, here 3 of 25."""


def picture(path: Path) -> np.ndarray:
    """(H, W, 3), RGB."""
    with Pillow.open(path) as image:
        return np.array(image.convert("RGB"))


@dataclass(frozen=True)
class Material:
    folder: Path
    smoke: bool
    given: str = field(default_factory=lambda: os.environ.get("FACESHARDS_DATA", ""))

    @property
    def data(self) -> Path | None:
        return Path(self.given).resolve() if self.given and not self.smoke else None

    @cached_property
    def pack(self) -> Path:
        """A detector of 2.5 GFLOP and a recogniser, or tiny ones with random weights."""
        if self.data:
            return self.data / "models" / "real"
        pack = self.folder / "pack"
        pack.mkdir()
        inference_models.scrfd(pack / "det_10g.onnx", tiny=True)
        inference_models.arcface(pack / "w600k_r50.onnx", tiny=True)
        return pack

    @cached_property
    def large_pack(self) -> Path:
        """A detector of SCRFD-10G's size with random weights, which sees nothing, and the pack's recogniser."""
        pack = self.folder / "large-pack"
        shutil.copytree(self.pack, pack, ignore=shutil.ignore_patterns("det_*"))
        inference_models.scrfd(pack / "det_10g.onnx", tiny=self.smoke)
        return pack

    @property
    def small_pack(self) -> Path:
        """One whose detector has 0.5 GFLOP."""
        return self.data / "models" / "extra" if self.data else self.pack

    @cached_property
    def labels(self) -> list[dict[str, str]]:
        """The unambiguous labelled photos."""
        if not self.data:
            return []
        with (self.data / "photos" / "labels.csv").open(newline="") as stream:
            return [row for row in csv.DictReader(stream) if not row["ambiguous"]]

    @cached_property
    def photos(self) -> Path:
        """The folder of the labelled photos, or of a few drawn ones."""
        if self.data:
            return self.data / "photos"
        folder = self.folder / "photos"
        folder.mkdir()
        for name, side in (("large", 1100), ("small", 300)):
            for number, (_, data) in enumerate(self.compose(4, 3, (side, side + 50), (0, 1, 0, 2))):
                (folder / f"{name}{number}.jpg").write_bytes(data)
        return folder

    @cached_property
    def names(self) -> tuple[list[str], list[str]]:
        """Files in that folder: those of at least 1,024 px on both sides, and the others."""
        if not self.data:
            files = sorted(path.name for path in self.photos.iterdir())
            return files[:4], files[4:]
        large = [row["file"] for row in self.labels if min(int(row["width"]), int(row["height"])) >= 1024]
        return large, [row["file"] for row in self.labels if row["file"] not in large]

    @cached_property
    def _pictures(self) -> tuple[list[composed.Face], list[np.ndarray]]:
        """Faces with their surroundings, and pictures without any."""
        installed = Path(skimage.__file__).parent / "data"
        grounds = [picture(next(installed.glob(f"{name}.*"))) for name in GROUNDS]
        if not self.data:
            return [composed.cut(picture(installed / "astronaut.png"), ASTRONAUT)], grounds
        from stages.detect import measure
        from stages.models.detectors.scrfd import Scrfd
        from stages.settings import ModelSettings

        detector = Scrfd(ModelSettings(pack=str(self.pack), accept_noncommercial=True), "cpu")
        faces = []
        for row in self.labels:
            photo = picture(self.photos / row["file"])
            if row["expected"] == "keep":
                faces.append(composed.cut(photo, measure(detector.detect(photo), 0.5)["bbox"]))
            elif row["reason"] == "noface":
                grounds.append(photo)
        return faces, grounds

    def compose(self, count: int, seed: int, side: tuple[int, int], wanted: tuple[int, ...]) -> list[tuple[int, bytes]]:
        return list(composed.compose(*self._pictures, count, seed, side, wanted))

    @cached_property
    def web(self) -> Path:
        """A folder of 150 web-like photos of 1,200 to 2,000 px, 88 % without a face."""
        folder = self.folder / "web"
        folder.mkdir()
        count, side = (8, (1030, 1060)) if self.smoke else (150, (1200, 2000))
        for number, (_, data) in enumerate(self.compose(count, 1, side, FACES)):
            (folder / f"{number:03}.jpg").write_bytes(data)
        return folder
