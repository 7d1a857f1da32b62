"""What a model backend is, and the registries that name them."""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, NamedTuple, Protocol

from schemas.arrays import Floats, Halves, Image, Labels
from schemas.errors import ConfigError
from stages.models import REGISTRIES
from stages.models.papers import Weight
from stages.runtime import Device
from stages.settings import ModelSettings, Settings


@dataclass(frozen=True)
class ModelCard:
    """What a manifest says of a model: one per weight file (or per method without weights)."""

    name: str
    task: str
    """One of REGISTRIES or of `models.heads`, captioner, or encoder (of a diffusion base)."""
    sha256: str
    """Of the weight file, hex, by its papers while that is lacking; empty for a method without weights."""
    licence: str
    commercial: bool
    """Whether the licence allows commercial use."""
    lacks: Weight | None = None
    """The weight that is missing here, or has a wrong sha256."""


class Faces(NamedTuple):
    """Detections of one image, best score first, in its pixels; scores go lower than det_thresh."""

    bbox: Floats
    """(N, 4): x1 y1 x2 y2."""
    kps: Floats
    """(N, 5, 2): left eye, right eye, nose, left and right mouth corner (left as seen in the image)."""
    score: Floats
    """(N,): 0..1."""


class ReducedLook(NamedTuple):
    """What a look at a reduced photo shows."""

    score: float
    """The best of any box, 0..1; of a doubtful one, what a closer look gives."""
    points: Floats
    """(N, 2): x y of what may be a face, however unlikely, in pixels of the reduced photo."""


class Backend(Protocol):
    runtime: str
    """What computes, and where, such as `torch cuda` or `onnxruntime CPUExecutionProvider`."""

    def __init__(self, settings: ModelSettings, device: Device) -> None:
        """Load the model on the device; runs on the worker."""

    @classmethod
    def weights(cls, settings: ModelSettings) -> tuple[Weight, ...]:
        """The weights that these settings need, for `models list` and `models fetch`; a method may have none."""

    @classmethod
    def cards(cls, settings: ModelSettings) -> list[ModelCard]:
        """The models of these settings; weights that are there are verified, none is loaded, none need be there."""


class WithoutWeights:
    """What methods of OpenCV and numpy share; subclasses are called as they are registered."""

    runtime = "opencv cpu"
    task: ClassVar[str]

    @classmethod
    def weights(cls, settings: ModelSettings) -> tuple[Weight, ...]:
        return ()

    @classmethod
    def cards(cls, settings: ModelSettings) -> list[ModelCard]:
        return [ModelCard(cls.__name__.lower(), cls.task, "", "Apache-2.0", True)]


class Detector(Backend, Protocol):
    def detect(self, image: Image) -> Faces:
        """Faces of one RGB photo."""


class Segmenter(Backend, Protocol):
    def segment(self, image: Image, kps: Floats) -> Labels:
        """(512, 512) labels, 19 CelebAMask classes in BiSeNet order, of an FFHQ-style aligned (512, 512, 3) RGB crop.

        `kps` are the five points in that crop, (5, 2).
        """


class FaceEmbedder(Backend, Protocol):
    def embed(self, faces: Image) -> Floats:
        """(N, 512) raw embeddings of (N, 112, 112, 3) RGB norm_crops."""


class FaceQuality(Backend, Protocol):
    def score(self, faces: Image) -> Floats:
        """(N,) of (N, 112, 112, 3) RGB norm_crops; larger is better, about 0..1."""


class ImageEmbedder(Backend, Protocol):
    def embed(self, images: Image) -> Mapping[str, Halves]:
        """Column name (clip, clip_hidden or dino) -> features of (N, 224, 224, 3) RGB images, N first."""

    def unconditional(self) -> Mapping[str, Halves]:
        """Column name (clip_hidden or dino) -> (257, D) features that stand for "no face" in training and guidance.

        Those of an all-zero tensor behind the preprocessing, as published adapters take them. `clip` has none: there,
        zeros stand for no face.
        """


ONNX_FILES = {"fiqa": "ediffiqa-t"}
"""Task -> the backend of a file that is given by its path."""
PACK_TASKS = {"detector": "scrfd", "face_embedder": "arcface"}
"""Task -> the backend that computes a file of `models.pack` for it."""


def runtime_of(task: str, settings: ModelSettings, device: Device) -> str:
    """What computes the ONNX file of a task, onnxruntime or torch: what is set, or what serves the device best."""
    chosen = {str(name): str(runtime) for name, runtime in settings.runtime.items()}
    return chosen.get(task, "torch" if device == "cuda" else "onnxruntime")


def backend(task: str, name: str) -> Any:
    """The backend class that is registered under a name; a ConfigError for an unknown one lists the known ones."""
    known = REGISTRIES[task]
    if task in ONNX_FILES and name.endswith(".onnx"):
        name = ONNX_FILES[task]
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        file = " (or the path of an .onnx file)" if task in ONNX_FILES else ""
        raise ConfigError(f"models.{task} = {name!r} is not known{hint}; choose one of: {', '.join(known)}{file}.")
    return pkgutil.resolve_name(known[name])


def chosen(settings: Settings) -> dict[str, str]:
    """Task -> the name of the backend that does it; without `pack.embeddings` no image is embedded."""
    names = {task: getattr(settings.models, task) for task in REGISTRIES}
    return {
        task: name
        for task, name in names.items()
        if (name or task not in ONNX_FILES) and (settings.pack.embeddings or task != "image_embedder")
    }


def backends(settings: Settings) -> list[type[Backend]]:
    """The classes that these settings name, one per task; a ConfigError as `backend` has it."""
    return [backend(task, name) for task, name in chosen(settings).items()]
