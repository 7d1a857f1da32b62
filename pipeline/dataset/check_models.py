"""Load models, and see what computes them, how fast, and that a batch does not change an image's result."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import cv2
import numpy as np

from pipeline.dataset.config import Config
from pipeline.dataset.needed_weights import Use, needed, state_of, uses
from pipeline.shared.bases import BASES
from schemas.errors import ShardError, UserError
from stages.caption.stage import captioner_class
from stages.models.backends import backend, chosen
from stages.models.papers import Weight
from stages.runtime import Device
from stages.settings import ModelSettings

_TOLERANCE = 0.02
"""Of the largest value. On a CPU batches change nothing; on a GPU the last bits of float16, which loading proves."""
_SIDE = {"detector": 1024, "segmenter": 512, "face_embedder": 112, "fiqa": 112, "image_embedder": 224, "captioner": 512}
_KPS = np.array([[193, 240], [319, 240], [257, 314], [201, 371], [313, 371]], np.float32)
"""Five points where an FFHQ-style crop of 512 px has them."""


class Check(NamedTuple):
    weights: str
    """Names of the weights; of the files or the method where these are of no known weight."""
    state: str
    task: str
    backend: str
    runtime: str
    milliseconds: float | None
    """Median per image, one at a time."""
    batch_difference: float | None
    """Largest difference of an image in a batch from the same image alone, as a share of the largest value."""
    problem: str
    """Why it cannot be used; empty where it can."""

    def __str__(self) -> str:
        name = f"{self.weights or self.backend}: {self.state}"
        if self.problem:
            return f"{self.weights or self.backend}: NOT USABLE as {self.task}: {self.problem}"
        if self.task == "photo":
            return f"{name}; numbers that are read off clip-vit-h's vectors, made for the ones here"
        if self.milliseconds is None:
            return f"{name}; not loaded here: no stage computes it"
        same = "batch = single" if not self.batch_difference else f"batch = single but for {self.batch_difference:.1e}"
        return f"{name}; {self.task} {self.backend} on {self.runtime}: {self.milliseconds:,.1f} ms an image, {same}"


def checks(config: Config, weights: Iterable[Weight] | None) -> Iterator[Check]:
    """Each of these weights by every backend that computes it; None: what the config names, and its base."""
    device: Device = "cuda" if config.executor.gpus else "cpu"
    if weights is None:
        for task, name in chosen(config).items():
            use = Use(task, name, {})
            yield from _checked(backend(task, use.backend).weights(config.models), [use], config.models, device)
        if config.models.captioner:
            yield _captioner(config, device)
        weights = [weight for weight in needed(config) if weight.name in BASES or weight.made_of]
    for weight in weights:
        yield from _checked([weight], list(uses(weight, config.models)), config.models, device)


def _checked(
    weights: Sequence[Weight], computed: Sequence[Use], settings: ModelSettings, device: Device
) -> Iterator[Check]:
    """One check per use of weights that are needed together; what is missing or damaged is not loaded."""
    states = [state_of(weight, settings, hashes=True) for weight in weights]
    names, state = ", ".join(weight.name for weight in weights), ", ".join(one.state for one in states)
    tasks = ", ".join(dict.fromkeys(task for weight in weights for task in weight.tasks))
    absent = ", ".join(f"{one.weight.name} is {one.state}" for one in states if not one.is_ready)
    if absent or not computed:
        yield Check(names, state, computed[0].task if len(computed) == 1 else tasks, "", "", None, None, absent)
        return
    for use in computed:
        changed, model_class = settings.model_copy(update=use.changes), backend(use.task, use.backend)
        try:
            label = names or ", ".join(card.name for card in model_class.cards(changed))
            model = model_class(changed, device)
            milliseconds, difference = measured(use.task, model)
        except UserError as error:
            yield Check(names, state, use.task, use.backend, "", None, None, str(error))
            continue
        problem = "an image's result depends on the others of its batch" if difference > _TOLERANCE else ""
        yield Check(label, state or "here", use.task, use.backend, model.runtime, milliseconds, difference, problem)


def _captioner(config: Config, device: Device) -> Check:
    """What comes of `models.captioner`; an endpoint gets the photos. The difference is the share of other captions."""
    named = config.models.captioner
    try:
        chosen = captioner_class(config.models)
        name, model = chosen.card(config).name, chosen(config, device)
        photos, alone, times = list(_photos(_SIDE["captioner"])), [], []
        for photo in photos:
            begun = time.perf_counter()
            alone += model.caption([photo])
            times.append(time.perf_counter() - begun)
        batches = [photos[start : start + model.batch] for start in range(0, len(photos), model.batch)]
        together = [caption for batch in batches for caption in model.caption(batch)]
    except (UserError, ShardError) as error:
        return Check(named, "", "captioner", "", "", None, None, str(error))
    differing = sum(map(str.__ne__, together, alone)) / len(photos)
    runtime = "its endpoint" if "://" in named else f"torch {device}"
    return Check(name, "here", "captioner", named, runtime, 1000 * median(times), differing, "")


def measured(task: str, model: Any) -> tuple[float, float]:
    """Milliseconds per image, and the difference between a batch and single images; see `Check`."""
    images = _photos(_SIDE[task])
    together, alone = _calls(task, model)
    singles, times = [], []
    alone(images[0])  # kernels are chosen, and memory is taken, at the first image
    for image in images:
        begun = time.perf_counter()
        singles.append(alone(image))
        times.append(time.perf_counter() - begun)
    pairs = zip(together(images), singles, strict=True)
    return 1000 * median(times), max(_difference(batch, single) for batch, single in pairs)


def _calls(task: str, model: Any) -> tuple[Callable[[Any], list[Any]], Callable[[Any], Any]]:
    """What takes many images and what takes one, each giving arrays per image."""
    if task == "detector":
        many = getattr(model, "detect_all", lambda images: [model.detect(image) for image in images])

        def best(faces: Any) -> list[Any]:
            return [values[:1] for values in faces]

        return lambda images: [best(faces) for faces in many(list(images))], lambda image: best(model.detect(image))
    if task == "segmenter":
        many = getattr(model, "segment_all", lambda images: [model.segment(image, _KPS) for image in images])
        return lambda images: [[labels] for labels in many(list(images))], lambda image: [model.segment(image, _KPS)]

    def embedded(images: Any) -> list[Any]:
        columns = model.score(images) if task == "fiqa" else model.embed(images)
        arrays = list(columns.values()) if isinstance(columns, Mapping) else [columns]
        return [[array[i] for array in arrays] for i in range(len(images))]

    return embedded, lambda image: embedded(image[None])[0]


def _difference(batch: list[Any], single: list[Any]) -> float:
    """The largest over arrays: of labels the share of those that differ, of numbers the largest over the largest."""
    differences = [0.0]
    for one, other in zip(batch, single, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if one.dtype == np.uint8:
            differences.append(float(np.mean(one != other)))
        elif one.size:
            gap, size = np.abs(one.astype(np.float64) - other).max(), np.abs(other).max()
            differences.append(float(gap / max(float(size), 1e-9)))
    return max(differences)


def _photos(side: int) -> Any:
    """(N, side, side, 3) RGB: a photo with a face that comes with a library, mirrored, darker, and both."""
    from skimage.data import astronaut

    photo = astronaut()
    photo = photo if side >= 512 else photo[20:270, 100:350]  # the head
    photo = cv2.resize(photo, (side, side), interpolation=cv2.INTER_AREA if side < 250 else cv2.INTER_CUBIC)
    return np.stack([photo, photo[:, ::-1], photo // 2, photo[:, ::-1] // 2])
