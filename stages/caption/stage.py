"""Caption: what a model sees in the photo, as a further caption beside the original.

Off unless `models.captioner` names a model: else nothing is loaded and its columns are null.
"""

import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from schemas.arrays import Image
from stages.base import BatchStage
from stages.models.backends import ModelCard
from stages.pixels.images import decode_jpeg, shrink
from stages.runtime import Device, Runtime
from stages.settings import ModelSettings, Settings


class Captioner(Protocol):
    batch: int
    """Pictures that it takes at a time."""

    def __init__(self, settings: Settings, device: Device) -> None:
        """Load the model on the device; runs on the worker."""

    @classmethod
    def card(cls, settings: Settings) -> ModelCard:
        """The model of these settings; nothing is loaded, no server is contacted."""

    def caption(self, images: Sequence[Image]) -> list[str]:
        """A caption of each (H, W, 3) RGB picture; empty where the model gives none."""


class Caption(BatchStage):
    """Captions the whole photo, or the largest crop where there is no `full`; drops nothing.

    Where the model has nothing to say of a photo (it refuses, or answers nothing) there is no caption, and
    `further_chars` is 0. An endpoint that fails fails the shard, so that no caption is missing by accident.
    """

    name = "caption"
    reads = ("full", "half", "portrait")
    writes = ("further_caption", "further_chars")

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        super().__init__(settings, runtime)
        self._captioner: Captioner | None = None
        if settings.models.captioner:
            self._captioner = captioner_class(settings.models)(settings, runtime.device)
            self.batch = self._captioner.batch

    def given(self, record: Mapping[str, Any]) -> Image | None:
        crop = record["full"] or record["half"] or record["portrait"] if self._captioner else None
        return shrink(decode_jpeg(crop), self.settings.caption.max_side) if crop else None

    def computed(self, given: Sequence[Image | None]) -> Sequence[str | None]:
        pictures = [image for image in given if image is not None]
        if self._captioner is None:
            return [None] * len(given)
        captions = iter(self._captioner.caption(pictures) if pictures else ())
        return ["" if image is None else " ".join(after_reasoning(next(captions)).split()) for image in given]

    def written(self, record: Mapping[str, Any], output: str | None) -> dict[str, Any]:
        return {} if output is None else {"further_caption": output or None, "further_chars": len(output)}


def captioner_class(models: ModelSettings) -> type[Captioner]:
    """What `models.captioner` names: an endpoint by its URL, or a folder."""
    kind = "endpoint:Endpoint" if "://" in models.captioner else "transformers_model:Folder"
    cls: type[Captioner] = pkgutil.resolve_name(f"stages.caption.{kind}")
    return cls


def after_reasoning(answer: str) -> str:
    """What a model answers once it has thought; nothing where it was cut off before.

    Servers without a parser for the model's reasoning pass it on, some without its first mark.
    """
    thought, _, caption = answer.rpartition("</think>")
    return "" if not thought and answer.lstrip().startswith("<think>") else caption
