"""What the steps of the inference benchmark share: the product's networks, and pictures."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import inference_models as models
import numpy as np

Record = Callable[[dict[str, Any]], None]


class Networks:
    """The product's four networks as its backends run them on a device; random where the pack has none."""

    def __init__(self, bench: "Bench") -> None:
        from stages.models.detectors.scrfd_torch import ScrfdTorch
        from stages.models.face_embedders.arcface_torch import ArcFaceTorch
        from stages.models.image_embedders.clip import ClipVitH
        from stages.models.segmenters.facexlib import FacexlibParser, label_batches
        from stages.models.torch_backend import IMAGENET

        self.detector = ScrfdTorch(bench.detector, bench.device)
        self.recogniser = ArcFaceTorch(bench.recogniser, bench.device)
        self.parser, self.tower = FacexlibParser.__new__(FacexlibParser), ClipVitH.__new__(ClipVitH)
        self.parser._name = "bisenet"
        self.parser._batches = label_batches(models.bisenet(), IMAGENET, bench.device)
        tower = models.vit_h(bench.device, tiny=bench.smoke)
        self.tower._device, self.tower._model = bench.device, tower.half() if bench.on_gpu else tower
        self.tower._batches = self.tower.batches(bench.device)


@dataclass
class Bench:
    """What all steps share."""

    device: str
    record: Record
    smoke: bool
    pack: Path | None
    photos: Path | None
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @functools.cached_property
    def detector(self) -> Path:
        """The pack's detector, or a random one."""
        files = sorted(self.pack.glob("det_*.onnx")) if self.pack else []
        return files[0] if files else models.scrfd(self.folder / "scrfd_10g.onnx", tiny=self.smoke)

    @functools.cached_property
    def recogniser(self) -> Path:
        return models.arcface(self.folder / "r50.onnx", tiny=self.smoke)

    @functools.cached_property
    def networks(self) -> Networks:
        return Networks(self)

    @functools.cached_property
    def pictures(self) -> list[Any]:
        """Pixels, RGB, of the given photos."""
        files = sorted(path for path in self.photos.iterdir() if path.suffix in (".jpg", ".png")) if self.photos else []
        pixels = [cv2.imread(str(path)) for path in files[: 4 if self.smoke else 40]]
        return [cv2.cvtColor(image, cv2.COLOR_BGR2RGB) for image in pixels if image is not None]


def noise(count: int, side: int, seed: int = 0) -> list[Any]:
    """Smooth coloured pictures, (side, side, 3) uint8."""
    rng = np.random.default_rng(seed)
    small = [rng.integers(0, 256, (max(side // 16, 2), max(side // 16, 2), 3), np.uint8) for _ in range(count)]
    return [cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC) for image in small]


def mixed_photos(bench: Bench, faceless: float, count: int = 100) -> list[str]:
    """JPEG files of 1600 x 1200 in a mix that is even over any stretch: from the given photos, or drawn."""
    folder = bench.folder / "photos"
    if not folder.exists():
        folder.mkdir()
        size = (400, 300) if bench.smoke else (1600, 1200)
        grain = np.random.default_rng(0).normal(0, 5, (size[1], size[0], 3)).astype(np.float32)
        for kind, images in zip(("face", "bare"), _sorted_pictures(bench), strict=True):
            for i, image in enumerate(images):
                share = min(size[0] / image.shape[1], size[1] / image.shape[0])
                scaled = cv2.resize(image, None, fx=share, fy=share, interpolation=cv2.INTER_CUBIC)
                whole = grain.copy()  # black where the photo does not reach
                part = whole[: scaled.shape[0], : scaled.shape[1]]
                part += scaled[: part.shape[0], : part.shape[1]]
                pixels = np.clip(whole, 0, 255).astype(np.uint8)[:, :, ::-1]
                cv2.imwrite(str(folder / f"{kind}{i:03}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    faces, bare = sorted(folder.glob("face*.jpg")), sorted(folder.glob("bare*.jpg"))
    picked, with_face = [], 0
    for i in range(count):
        if with_face < (i + 1) * (1 - faceless) - 1e-6:
            picked.append(str(faces[with_face % len(faces)]))
            with_face += 1
        else:
            picked.append(str(bare[(i - with_face) % len(bare)]))
    return picked


def _sorted_pictures(bench: Bench) -> tuple[list[Any], list[Any]]:
    """Pictures with one face and pictures without, by the pack's detector where there is one."""
    from stages.models.detectors.scrfd import Scrfd
    from stages.settings import ModelSettings

    drawn = noise(2 if bench.smoke else 12, 512, seed=1)
    faces, bare = [], []
    if bench.pictures and bench.pack:
        settings = ModelSettings.model_validate({"pack": str(bench.pack), "runtime": {"detector": "torch"}})
        for image, detected in zip(
            bench.pictures, Scrfd(settings, bench.device).detect_all(bench.pictures), strict=True
        ):
            if np.count_nonzero(detected.score >= settings.det_thresh) == 1:
                faces.append(image)
            elif len(detected.score) == 0:
                bare.append(image)
    return faces or drawn[: len(drawn) // 2], [*bare, *drawn[len(drawn) // 2 :]]
