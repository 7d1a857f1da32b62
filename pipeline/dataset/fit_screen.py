"""Fit the screen's threshold on photos: how it scores those that the full look keeps, and how many others pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.dataset.config import PROFILES, Config
from pipeline.dataset.plan import make_plan
from pipeline.dataset.source.pictures import is_image
from schemas.digest import sha256
from schemas.drops import Dropped
from schemas.errors import ConfigError, SourceError
from stages.detect import measure
from stages.filter import judge
from stages.models.backends import backend
from stages.pixels.images import photo, reduced
from stages.runtime import Runtime
from stages.screen import factor
from stages.settings import Settings
from stages.size import Size


@dataclass(frozen=True)
class Screened:
    """One photo: its name, the best score in its reduced form, and whether the full look keeps it."""

    name: str
    score: float
    kept: bool


def screened(folder: Path, settings: Settings, runtime: Runtime) -> Iterator[Screened]:
    """Both looks at every photo of a folder and its subfolders that is large enough.

    Raises:
        ConfigError: when these settings have no screen.
        SourceError: when the folder holds no image files.
    """
    by = factor(settings.models, settings.filter)
    if not by:
        raise ConfigError("These settings have no screen: models.screen is off, or the detector is not scrfd.")
    files = sorted(path for path in folder.rglob("*") if is_image(path.name) and path.is_file())
    if not files:
        raise SourceError(f"{folder} holds no image files.")
    detector = backend("detector", settings.models.detector)
    look, full = detector.screen(settings.models, runtime.device), detector(settings.models, runtime.device)
    if look is None:
        raise ConfigError("The detector takes images of one size only, and cannot screen: name another pack's.")
    size = Size(settings, runtime)
    for path in files:
        data = path.read_bytes()
        digest = sha256(data)
        try:
            size.row({"image": data})
            ((score, _),) = look([reduced(digest, data, by)])
            measured = measure(full.detect(photo(digest, data)), settings.models.det_thresh)
        except Dropped:
            continue  # too small or damaged: neither look matters
        verdict = judge({"bbox": None, "kps": None, "face_px": None, **measured}, settings.filter)
        yield Screened(str(path.relative_to(folder)), score, verdict is None)


def fit(photos: Sequence[Screened], margin: float) -> float:
    """The threshold: the lowest score of a photo that is kept, times `margin`; a SourceError when none is kept."""
    kept = [one.score for one in photos if one.kept]
    if not kept:
        raise SourceError("None of the photos is kept by the full look, so nothing can be fitted: give others.")
    return round(min(kept) * margin, 3)


def effect(photos: Sequence[Screened], threshold: float) -> tuple[list[str], float]:
    """Photos that the full look keeps and the screen would drop; share of the others that get the full look, 0 to 1."""
    others = [one.score >= threshold for one in photos if not one.kept]
    return [one.name for one in photos if one.kept and one.score < threshold], sum(others) / max(1, len(others))


def lines(folder: Path, config: Config, margin: float) -> Iterator[str | Table]:
    """What `screen` says of a folder of photos; raises what `screened` and `fit` raise."""
    if not folder.is_dir():
        raise SourceError(f"{folder} is no folder: give one of photos.")
    # Weights and licences of the detector alone: no other model looks at these photos.
    own: dict[str, Any] = {**PROFILES["embedded"]["models"], "detector": config.models.detector}
    own |= {"captioner": "", "fiqa": "", "heads": {}}
    own |= {"screen": "detector"} if config.models.screen == "off" else {}
    models = config.models.model_copy(update=own)
    make_plan(Config(executor=config.executor, models=models))
    settings = Settings(models=models, filter=config.filter)
    seen, current = list(screened(folder, settings, Runtime())), models.screen_thresh
    kept = [one.score for one in seen if one.kept]
    fitted = fit(seen, margin)
    yield f"{len(seen)} photos; the full look keeps {len(kept)}, whose scores begin at {min(kept):.3f}."
    table = Table("threshold", "missed of kept", "others that get the full look")
    for threshold in (current, fitted):
        missed, passed = effect(seen, threshold)
        table.add_row(f"{threshold:.3f}", str(len(missed)), f"{100 * passed:.1f} %")
    yield table
    yield from (f"missed at {current}: {name}" for name in effect(seen, current)[0])
    yield f"With a margin of {margin}: --set models.screen_thresh={fitted}"
