"""Embed the picture of the face: CLIP (or DINOv2) features of the face crop without its background, or with it.

`segment.condition` says which; of the mirrored crop too, where `encode.mirror` asks for it.
"""

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.columns import FEATURES, TOKENS
from schemas.drops import DropReason
from schemas.int8 import encode_int8, quantise
from schemas.shard import encode_npy
from stages.base import to_table
from stages.models.backends import ImageEmbedder, backend
from stages.pixels.geometry import foreground
from stages.pixels.images import decode_jpeg, decode_png
from stages.runtime import Runtime
from stages.settings import Settings


class EmbedImage:
    """Embeds the face crops by the configured image embedder; drops nothing.

    Loads nothing and leaves all its columns null where `pack.embeddings` is off.
    """

    name: ClassVar[str] = "embed_image"
    reads: ClassVar[tuple[str, ...]] = ("face", "mask")
    writes: ClassVar[tuple[str, ...]] = (*FEATURES, *(f"{name}_int8" for name in TOKENS))
    drops: ClassVar[tuple[DropReason, ...]] = ()

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        """Load the image embedder."""
        self._settings, self._device = settings, runtime.device
        self._embedder: ImageEmbedder | None = None
        if settings.pack.embeddings:
            make = backend("image_embedder", settings.models.image_embedder)
            self._embedder = make(settings.models, runtime.device)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Embed all rows; columns that the backend does not give stay null."""
        if self._embedder is None:
            return to_table([{}] * table.num_rows, self.writes, self.drops)
        segment, images = self._settings.segment, {}
        faces = [decode_jpeg(face) for face in table["face"].to_pylist()]
        if segment.condition != "plain":
            masks = [decode_png(mask) for mask in table["mask"].to_pylist()]
            images[""] = [foreground(*pair, segment.keep, segment.fill) for pair in zip(faces, masks, strict=True)]
        if segment.condition != "segmented":
            images["_plain"] = faces
        # On a CPU a batch gains nothing, and its sums may depend on its size; on a GPU it gains 3 to 10 times.
        step = max(1, len(faces)) if self._device == "cuda" else 1
        rows: list[dict[str, Any]] = []
        for start in range(0, len(faces), step):
            features: dict[str, npt.NDArray[np.float16]] = {}
            for plain, pictures in images.items():
                batch = np.stack(pictures[start : start + step])
                features |= {f"{name}{plain}": column for name, column in self._embedder.embed(batch).items()}
                if self._settings.encode.mirror:
                    mirrored = self._embedder.embed(np.ascontiguousarray(batch[:, :, ::-1]))
                    features |= {f"{name}{plain}_mirror": column for name, column in mirrored.items()}
            rows += (dict(self._file(name, column[i]) for name, column in features.items()) for i in range(len(batch)))
        return to_table(rows, self.writes, self.drops)

    def _file(self, name: str, features: npt.NDArray[np.float16]) -> tuple[str, bytes]:
        """Column and content: of the features of a whole picture always npy, of its tokens (T, D) as is configured."""
        if features.ndim == 2 and self._settings.pack.hidden == "int8":
            return f"{name}_int8", encode_int8(quantise(features))
        return name, encode_npy(features)
