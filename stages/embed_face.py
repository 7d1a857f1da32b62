"""Embed the face: who it is, as a vector of unit length and the length that it had; and how good it is for that."""

from typing import Any

import numpy as np
import pyarrow as pa

from schemas.arcface import ARCFACE_SIZE
from schemas.drops import DropReason
from schemas.shard import encode_npy
from stages.base import DROP, Stage, to_table
from stages.filter import poor, reasons
from stages.models.backends import FaceEmbedder, FaceQuality, backend
from stages.runtime import Runtime
from stages.settings import Settings


class EmbedFace(Stage):
    """Embeds the 112 norm_crops by the configured face embedder, and scores them where `models.fiqa` is set."""

    name = "embed_face"
    reads = ("face112",)
    writes = ("arcface", "embedding_norm", "fiqa")
    drops = (DropReason.BAD_EMBEDDING, *reasons("embed_face"))

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self._is_packed, self._limits = settings.pack.embeddings, settings.filter
        make = backend("face_embedder", settings.models.face_embedder)
        self._embedder: FaceEmbedder = make(settings.models, runtime.device)
        self._fiqa: FaceQuality | None = None
        if settings.models.fiqa:
            self._fiqa = backend("fiqa", settings.models.fiqa)(settings.models, runtime.device)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Embed all rows; a backend may take them as one batch. A vector that no shard is to hold goes no further."""
        pixels = np.frombuffer(b"".join(table["face112"].to_pylist()), np.uint8)
        faces = pixels.reshape(-1, ARCFACE_SIZE, ARCFACE_SIZE, 3)
        scores = self._fiqa.score(faces).tolist() if self._fiqa else [None] * len(faces)
        rows: list[dict[str, Any]] = []
        for embedding, score in zip(self._embedder.embed(faces), scores, strict=True):
            raw = np.asarray(embedding, np.float64)
            norm = float(np.linalg.norm(raw))
            if not (np.isfinite(norm) and norm > 0):
                rows.append({DROP: DropReason.BAD_EMBEDDING})
                continue
            normed = encode_npy((raw / norm).astype(np.float32)) if self._is_packed else None
            row = {"arcface": normed, "embedding_norm": norm, "fiqa": score}
            rows.append({**row, DROP: poor(self.name, row, self._limits)})
        return to_table(rows, self)
