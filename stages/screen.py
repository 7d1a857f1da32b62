"""Screen: a cheap look at the reduced photo. Where it sees nothing at all, there is no face that could be kept."""

from collections.abc import Mapping, Sequence
from typing import Any

from schemas.arrays import Image
from schemas.drops import Dropped, DropReason
from stages.base import BatchStage
from stages.models.backends import ReducedLook, backend
from stages.pixels.decoding import decoder
from stages.pixels.headers import UNDECODABLE
from stages.pixels.images import reduced
from stages.runtime import Runtime
from stages.settings import FilterSettings, ModelSettings, Settings

SEEN_PX = 16
"""Short side from which detectors see a face at a low score."""
_FACTORS = (8, 4, 2)
_GPU_BATCH = 64


class Screen(BatchStage):
    """Drops photos in which a detector sees nothing, even at a low score, at a fraction of their size.

    Passes every row, unmeasured, where `models.screen` is off or the detector has no such look.
    """

    name = "screen"
    reads = ("image", "sha256")
    writes = ("screen_score", "screen_points")
    drops = (DropReason.NO_FACE, *UNDECODABLE)

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        """Load what looks; meanwhile the decoder starts, whose first user this is or `Detect`."""
        super().__init__(settings, runtime)
        if runtime.device == "cpu":  # on a GPU each thread has one of its own
            decoder().start()
        self._factor = factor(settings.models, settings.filter)
        self._look: Any = None
        if self._factor:
            self._look = backend("detector", settings.models.detector).screen(settings.models, runtime.device)
        if runtime.device == "cuda":
            self.batch = _GPU_BATCH

    def given(self, record: Mapping[str, Any]) -> Image | None:
        return reduced(record["sha256"], record["image"], self._factor) if self._look else None

    def computed(self, given: Sequence[Image | None]) -> Sequence[ReducedLook | None]:
        looks: Sequence[ReducedLook | None] = self._look(given) if self._look else [None] * len(given)
        return looks

    def written(self, record: Mapping[str, Any], output: ReducedLook | None) -> dict[str, Any]:
        if output is None:
            return {}
        if not output.score >= self.settings.models.screen_thresh:
            raise Dropped(DropReason.NO_FACE, screen_score=output.score)
        return {"screen_score": output.score, "screen_points": (output.points * self._factor).tolist()}


def factor(models: ModelSettings, limits: FilterSettings) -> int:
    """What photos are reduced by: the smallest face that may be kept stays visible. 0 where there is no screen."""
    if models.screen == "off" or not hasattr(backend("detector", models.detector), "screen"):
        return 0
    return next((factor for factor in _FACTORS if limits.min_face_px / factor >= SEEN_PX), 0)
