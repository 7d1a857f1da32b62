"""Embed the picture of the face: CLIP (or DINOv2) features of the face crop without its background, or with it.

`segment.condition` says which; of the mirrored crop too, where `encode.mirror` asks for it. And what `models.heads`
read off CLIP's: whether the face is that of a photo, and scores of the whole photo.
"""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from schemas.arrays import Halves
from schemas.columns import FEATURES, TOKENS
from schemas.errors import WeightsError
from schemas.int8 import encode_int8, quantise
from schemas.shard import encode_npy
from stages.align import FACE_SIZE
from stages.base import DROP, Stage, records, to_table
from stages.filter import poor, reasons
from stages.models.backends import ImageEmbedder, backend
from stages.models.heads import MEASURES, heads_of
from stages.pixels.geometry import foreground
from stages.pixels.images import decode_jpeg, decode_png, photo_of
from stages.runtime import Runtime
from stages.settings import Settings


class EmbedImage(Stage):
    """Embeds the face crops by the configured image embedder; drops none unless thresholds on heads are set.

    Loads nothing and leaves all its columns null where `pack.embeddings` is off.
    """

    name = "embed_image"
    reads = ("face", "mask", "image", "sha256")
    writes = (*FEATURES, *(f"{name}_int8" for name in TOKENS), *MEASURES.values())
    drops = reasons("embed_image")

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        """Load the image embedder and the heads that the run uses.

        Raises:
            WeightsError: when one of these is not on this machine as it is where the run was planned.
        """
        self._settings, self._device = settings, runtime.device
        self._embedder: ImageEmbedder | None = None
        if settings.pack.embeddings:
            make = backend("image_embedder", settings.models.image_embedder)
            self._embedder = make(settings.models, runtime.device)
        self._heads = heads_of(settings) if runtime.heads else {}
        if tuple((name, head.sha256) for name, head in self._heads.items()) != runtime.heads:
            wanted = ", ".join(name for name, _ in runtime.heads)
            raise WeightsError(f"The heads of this run ({wanted}) are not on this machine, or are others: copy them.")

    def __call__(self, table: pa.Table) -> pa.Table:
        if self._embedder is None:
            return to_table([{}] * table.num_rows, self)
        segment, images = self._settings.segment, {}
        faces = [decode_jpeg(face) for face in table["face"].to_pylist()]
        if segment.condition != "plain":
            masks = [decode_png(mask) for mask in table["mask"].to_pylist()]
            images[""] = [foreground(*pair, segment.keep, segment.fill) for pair in zip(faces, masks, strict=True)]
        if segment.condition != "segmented":
            images["_plain"] = faces
        # On a CPU a batch gains nothing, and its sums may depend on its size; on a GPU it gains 3 to 10 times.
        step = len(faces) if self._device == "cuda" else 1
        rows: list[dict[str, Any]] = []
        for start in range(0, len(faces), step):
            features: dict[str, Halves] = {}
            for plain, pictures in images.items():
                batch = np.stack(pictures[start : start + step])
                features |= {f"{name}{plain}": column for name, column in self._embedder.embed(batch).items()}
                if self._settings.encode.mirror:
                    mirrored = self._embedder.embed(np.ascontiguousarray(batch[:, :, ::-1]))
                    features |= {f"{name}{plain}_mirror": column for name, column in mirrored.items()}
            measured = self._measured(features, table.slice(start, step))
            for i, row in enumerate(measured):
                for name, column in features.items():
                    if column.ndim == 3 and self._settings.pack.hidden == "int8":  # tokens, (N, T, D)
                        row[f"{name}_int8"] = encode_int8(quantise(column[i]))
                    else:
                        row[name] = encode_npy(column[i])
                rows.append({**row, DROP: poor(self.name, row, self._settings.filter)})
        return to_table(rows, self)

    def _measured(self, features: Mapping[str, Halves], rows: pa.Table) -> list[dict[str, Any]]:
        """What heads give of each row: `photo` by the features of the face, the others by those of the whole photo."""
        vectors: dict[str, Any] = {"photo": features.get("clip_plain", features.get("clip"))}
        if self._embedder and self._heads.keys() - vectors.keys():
            squares = []
            for record in records(rows):  # the middle, as CLIP itself cuts
                image = photo_of(record)
                height, width = image.shape[:2]
                short = min(height, width)
                y, x = (height - short) // 2, (width - short) // 2
                square = image[y : y + short, x : x + short]
                squares.append(cv2.resize(square, (FACE_SIZE, FACE_SIZE), interpolation=cv2.INTER_AREA))
            whole = self._embedder.embed(np.array(squares, np.uint8))["clip"]
            vectors |= dict.fromkeys(("aesthetic", "nsfw"), whole)
        measured: list[dict[str, Any]] = [dict.fromkeys(MEASURES.values()) for _ in range(rows.num_rows)]
        for name, head in self._heads.items():
            for row, value in zip(measured, head(vectors[name]).tolist(), strict=True):
                row[MEASURES[name]] = value
        return measured
