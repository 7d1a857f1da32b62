"""The pipeline, read top to bottom: the stages in their order, and where each runs."""

import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from stages.base import Stage

Where = Literal["source", "fetch", "models", "write"]
"""While the part is read; on the shard's worker; in a process that holds all models; on the shard's worker again."""


@dataclass(frozen=True)
class Step:
    """A stage's class, as `module:Class`, and where it runs."""

    path: str
    at: Where

    def stage(self) -> "type[Stage]":
        """The class, whose module is imported only now."""
        cls: type[Stage] = pkgutil.resolve_name(self.path)
        return cls


STAGES: dict[str, Step] = {
    # what the metadata says: size, safety, duplicates; before any download
    "metadata": Step("stages.metadata:Metadata", at="source"),
    # bytes from the web, or from an existing download
    "download": Step("stages.download:Download", at="fetch"),
    # header only: format, whole file, both sides at least filter.min_image_px
    "size": Step("stages.size:Size", at="fetch"),
    # a cheap look at the reduced photo: nothing there, nothing is decoded in full
    "screen": Step("stages.screen:Screen", at="models"),
    # measures faces: count, box, five points, scores
    "detect": Step("stages.detect:Detect", at="models"),
    # judges the measurements: exactly one face, large enough
    "filter": Step("stages.filter:Filter", at="models"),
    # norm_crop to 224 and 112
    "align": Step("stages.align:Align", at="models"),
    # face parsing on a wider crop, warped onto the 224 crop
    "segment": Step("stages.segment:Segment", at="models"),
    # portrait, half, full
    "crop": Step("stages.crop:Crop", at="models"),
    # normed ArcFace embedding
    "embed_face": Step("stages.embed_face:EmbedFace", at="models"),
    # CLIP (or DINOv2) features of the segmented face
    "embed_image": Step("stages.embed_image:EmbedImage", at="models"),
    # only where `--with` names them: latents and text embeddings, ready for training
    "encode": Step("stages.encode:Encode", at="models"),
    # only with `models.captioner`: a further caption of what is kept
    "caption": Step("stages.caption.stage:Caption", at="models"),
    # the sample's json
    "pack": Step("stages.pack:Pack", at="write"),
}
