"""What all steps of the inference benchmark share: models, pictures, and how long a call takes."""

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import inference_models as models
import numpy as np

Record = Callable[[dict[str, Any]], None]
_PEAK = 790e12
"""Measured products of 8192^3 float16 matrices on an H100 or H200, FLOP/s; replaced by this device's own."""
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass
class Bench:
    """What all steps share."""

    device: str
    record: Record
    smoke: bool
    pack: Path | None
    photos: Path | None
    folder: Path
    deadline: float = 0.0
    peak: float = _PEAK
    rates: dict[tuple[str, int], float] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def half(self) -> Any:
        import torch

        return torch.float16 if self.on_gpu else torch.float32

    def sync(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()

    @functools.cached_property
    def scrfd_10g(self) -> Path:
        return models.scrfd(self.folder / "scrfd_10g.onnx", tiny=self.smoke)

    @functools.cached_property
    def detector(self) -> Path:
        """The pack's detector, or a random one."""
        found = sorted(self.pack.glob("det_*.onnx")) if self.pack else []
        return found[0] if found else self.scrfd_10g

    @functools.cached_property
    def recogniser(self) -> Path:
        return models.arcface(self.folder / "r50.onnx", tiny=self.smoke)

    @functools.cached_property
    def bisenet(self) -> Any:
        return models.bisenet()

    @functools.cached_property
    def vit(self) -> Any:
        """float32, on the device."""
        return models.vit_h(self.device, tiny=self.smoke)

    @functools.cached_property
    def vit_half(self) -> Any:
        return copy.deepcopy(self.vit).to(self.half())

    @functools.cached_property
    def pictures(self) -> list[tuple[str, Any]]:
        """Name and pixels, RGB, of the given photos."""
        files = sorted(path for path in self.photos.iterdir() if path.suffix in (".jpg", ".png")) if self.photos else []
        pixels = [(path.name, cv2.imread(str(path))) for path in files[: 4 if self.smoke else 40]]
        return [(name, cv2.cvtColor(image, cv2.COLOR_BGR2RGB)) for name, image in pixels if image is not None]


def noise(count: int, side: int, seed: int = 0) -> list[Any]:
    """Smooth coloured pictures, (side, side, 3) uint8."""
    rng = np.random.default_rng(seed)
    small = [rng.integers(0, 256, (max(side // 16, 2), max(side // 16, 2), 3), np.uint8) for _ in range(count)]
    return [cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC) for image in small]


def three_looks(network: Any, side: int) -> Any:
    """Product code's three looks with a given network."""
    from stages.models.detectors.scrfd import Scrfd

    scrfd = Scrfd.__new__(Scrfd)
    scrfd._model, scrfd._size, scrfd._threshold = network, side, 0.5
    scrfd._second_look = (0.0, 0.0)
    scrfd._screen_size = side * 3 // 10 // 32 * 32
    return scrfd


def vit_features(model: Any, device: str, dtype: Any) -> Callable[[Any], tuple[Any, ...]]:
    """As ClipVitH: projected, and penultimate hidden states."""
    from stages.models.torch_backend import normaliser

    normalise = normaliser(*_CLIP, device, dtype)

    def features(images: Any) -> tuple[Any, ...]:
        out = model(pixel_values=normalise(images), output_hidden_states=True)
        return out.image_embeds, out.hidden_states[-2]

    return features


def prepared(bench: Bench, name: str, batches: Any, side: int) -> tuple[Any, Any, Callable[[], Any]]:
    """Pinned images, images on the device, and what computes with them; eager where no graph can be captured."""
    import torch

    with torch.inference_mode():
        try:
            return batches._prepared((side, side, 3))
        except RuntimeError as error:
            bench.record({"model": name, "no_graph": f"{type(error).__name__}: {str(error)[:300]}"})
            bench.sync()
            batches._graphs = False
            batches._of_shape.clear()
            return batches._prepared((side, side, 3))


def per_second(bench: Bench, call: Callable[[], Any], images: int, seconds: float = 0.25) -> float:
    """Images/s of a call that computes `images`; by CUDA events after three calls that do not count."""
    import torch

    with torch.inference_mode():
        if not bench.on_gpu:
            begin = time.perf_counter()
            call()
            return images / (time.perf_counter() - begin)
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        begin, calls = time.perf_counter(), 0
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        while time.perf_counter() - begin < seconds and calls < 400:
            call()
            calls += 1
            if calls % 4 == 0:
                torch.cuda.current_stream().synchronize()
        end.record()
        torch.cuda.synchronize()
        return images * calls / (start.elapsed_time(end) / 1e3)


def encoded_photos(bench: Bench) -> tuple[list[Path], list[Path]]:
    """JPEGs of 1600 x 1200, with one face and without: from the given photos, or drawn."""
    folder = bench.folder / "photos"
    if not folder.exists():
        folder.mkdir()
        size = (400, 300) if bench.smoke else (1600, 1200)
        faces, bare = _sorted_pictures(bench)
        rng = np.random.default_rng(0)
        grain = rng.normal(0, 5, (size[1], size[0], 3)).astype(np.float32)
        for kind, images in (("face", faces), ("bare", bare)):
            for i, image in enumerate(images):
                height, width = image.shape[:2]
                share = min(size[0] / width, size[1] / height)
                whole = cv2.resize(image, size).astype(np.float32) * 0  # black where the photo does not reach
                scaled = cv2.resize(image, (int(width * share), int(height * share)), interpolation=cv2.INTER_CUBIC)
                whole[: scaled.shape[0], : scaled.shape[1]] = scaled
                pixels = np.clip(whole + grain, 0, 255).astype(np.uint8)[:, :, ::-1]
                cv2.imwrite(str(folder / f"{kind}{i:03}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    return sorted(folder.glob("face*.jpg")), sorted(folder.glob("bare*.jpg"))


def _sorted_pictures(bench: Bench) -> tuple[list[Any], list[Any]]:
    """Pictures with one face and pictures without, by the pack's detector where there is one."""
    from stages.models.detectors.scrfd_torch import ScrfdTorch

    drawn = noise(2 if bench.smoke else 12, 512, seed=1)
    faces, bare = [], []
    if bench.pictures and bench.pack:
        scrfd = three_looks(ScrfdTorch(bench.detector, bench.device), 640)
        images = [image for _, image in bench.pictures]
        for image, found in zip(images, scrfd.detect_all(images), strict=True):
            count = int((found.score >= 0.5).sum())
            if count == 1:
                faces.append(image)
            elif len(found.score) == 0:
                bare.append(image)
    return faces or drawn[: len(drawn) // 2], [*bare, *drawn[len(drawn) // 2 :]]


def mixed_photos(bench: Bench, faceless: float, count: int = 100) -> list[str]:
    """Files in a mix that is even over any stretch."""
    faces, bare = encoded_photos(bench)
    picked, with_face = [], 0
    for i in range(count):
        if with_face < (i + 1) * (1 - faceless) - 1e-6:
            picked.append(str(faces[with_face % len(faces)]))
            with_face += 1
        else:
            picked.append(str(bare[(i - with_face) % len(bare)]))
    return picked
