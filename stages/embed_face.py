"""Embed the face: who it is, as a vector of unit length and the length that it had."""

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from schemas.drops import DropReason
from schemas.shard import encode_npy
from stages.base import DROP, to_table
from stages.models.backends import FaceEmbedder, Floats, backend
from stages.pixels.images import decode_png
from stages.runtime import Runtime
from stages.settings import Settings


class EmbedFace:
    """Embeds the 112 norm_crops by the configured face embedder."""

    name: ClassVar[str] = "embed_face"
    reads: ClassVar[tuple[str, ...]] = ("face112",)
    writes: ClassVar[tuple[str, ...]] = ("arcface", "embedding_norm")
    drops: ClassVar[tuple[DropReason, ...]] = (DropReason.BAD_EMBEDDING,)

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        """Load the face embedder."""
        self._kept = settings.pack.embeddings
        make = backend("face_embedder", settings.models.face_embedder)
        self._embedder: FaceEmbedder = make(settings.models, runtime.device)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Embed all rows; a backend may take them as one batch. A vector that is not to be kept goes no further."""
        faces = [decode_png(data) for data in table["face112"].to_pylist()]
        embeddings = self._embedder.embed(np.stack(faces)) if faces else ()
        rows = [_row(embedding) for embedding in embeddings]
        return to_table([row if self._kept else {**row, "arcface": None} for row in rows], self.writes, self.drops)


def _row(embedding: Floats) -> dict[str, Any]:
    """`normed_embedding` and norm of a raw embedding (512,), or the drop."""
    raw = np.asarray(embedding, np.float64)
    norm = float(np.linalg.norm(raw))
    if not (np.isfinite(norm) and norm > 0):
        return {DROP: DropReason.BAD_EMBEDDING}
    return {"arcface": encode_npy((raw / norm).astype(np.float32)), "embedding_norm": norm}
