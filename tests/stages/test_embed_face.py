"""Embed the face: unit vectors, their raw norm, and the order of rows."""

import numpy as np
import pyarrow as pa
import pytest
from skimage import data

from schemas.columns import schema
from schemas.drops import DropReason
from schemas.record import check
from schemas.shard import decode_npy
from stages.base import DROP
from stages.embed_face import EmbedFace
from stages.models.backends import backend
from stages.runtime import Runtime
from stages.settings import Settings

SETTINGS = Settings.model_validate({"models": {"face_embedder": "lbp"}})
FACE = np.ascontiguousarray(data.astronaut()[70:182, 170:282])
MIRRORED = np.ascontiguousarray(FACE[:, ::-1])
BLACK = np.zeros((112, 112, 3), np.uint8)


def run(*faces: np.ndarray, settings: Settings = SETTINGS) -> pa.Table:
    table = pa.table({"face112": [face.tobytes() for face in faces]}, schema=schema(EmbedFace.reads))
    return EmbedFace(settings, Runtime())(table)


@pytest.fixture(scope="module")
def embedded() -> pa.Table:
    return run(FACE, BLACK, MIRRORED)


def test_columns_are_as_declared(embedded: pa.Table) -> None:
    check(embedded.drop_columns([DROP]), EmbedFace.writes, "embed_face")


def test_vectors_have_unit_length_and_the_norm_brings_the_raw_one_back(embedded: pa.Table) -> None:
    raw = backend("face_embedder", "lbp")(SETTINGS.models, "cpu").embed(np.stack([FACE, MIRRORED]))
    for row, expected in zip((0, 2), raw, strict=True):
        vector = decode_npy(embedded["arcface"][row].as_py())
        assert (vector.dtype, vector.shape) == (np.float32, (512,))
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
        assert np.linalg.norm(expected) > 2  # else the test would not tell raw from normed
        np.testing.assert_allclose(vector * embedded["embedding_norm"][row].as_py(), expected, rtol=1e-5, atol=1e-5)


def test_drops_bad_embedding(embedded: pa.Table) -> None:
    assert embedded[DROP].to_pylist() == [None, DropReason.BAD_EMBEDDING, None]
    assert embedded["arcface"][1].as_py() is None


def test_drops_weak_embedding(embedded: pa.Table) -> None:
    norm = embedded["embedding_norm"][0].as_py()
    for limit, reason in ((norm, None), (norm * 1.01, DropReason.WEAK_EMBEDDING)):
        settings = Settings.model_validate({**SETTINGS.model_dump(), "filter": {"min_embedding_norm": limit}})
        result = run(FACE, BLACK, settings=settings)
        assert result[DROP].to_pylist() == [reason, DropReason.BAD_EMBEDDING]
        assert result["embedding_norm"][0].as_py() == norm


class Quality:
    """Scores by the first grey level."""

    def score(self, faces: np.ndarray) -> np.ndarray:
        return faces[:, 0, 0, 0].astype(np.float32) / 255


def test_drops_low_fiqa(embedded: pa.Table) -> None:
    assert embedded["fiqa"].null_count == 3, "nobody scores them"
    for limit, reason in ((0, None), (0.25, None), (0.26, DropReason.LOW_FIQA)):
        stage = EmbedFace(Settings.model_validate({**SETTINGS.model_dump(), "filter": {"min_fiqa": limit}}), Runtime())
        stage._fiqa = Quality()
        faces = np.stack([FACE, FACE])
        faces[:, 0, 0] = [[64], [255]]
        result = stage(pa.table({"face112": [face.tobytes() for face in faces]}, schema=schema(EmbedFace.reads)))
        assert result["fiqa"].to_pylist() == [np.float32(64 / 255), 1]
        assert result[DROP].to_pylist() == [reason, None]


class Overflown:
    """A recogniser one of whose numbers is not finite."""

    def __init__(self, value: float) -> None:
        self.value = value

    def embed(self, faces: np.ndarray) -> np.ndarray:
        vectors = np.ones((len(faces), 512), np.float32)
        vectors[:, 7] = self.value
        return vectors


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_drops_bad_embedding_that_is_not_finite(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    fields = {"_embedder": Overflown(value), "_fiqa": None}
    monkeypatch.setattr(EmbedFace, "__init__", lambda self, settings, runtime: self.__dict__.update(fields))
    assert run(FACE)[DROP].to_pylist() == [DropReason.BAD_EMBEDDING]


def test_a_vector_does_not_depend_on_its_batch(embedded: pa.Table) -> None:
    assert run(MIRRORED)["arcface"][0] == embedded["arcface"][2]
    assert run().num_rows == 0
