"""Embed the picture: the background must not matter, and shapes and nulls must be as declared."""

import numpy as np
import pyarrow as pa
import pytest
from skimage import data

from schemas.columns import schema
from schemas.digest import sha256
from schemas.int8 import decode_int8, quantise
from schemas.record import check
from schemas.shard import decode_npy
from stages.base import DROP
from stages.embed_image import EmbedImage
from stages.pixels.images import encode_jpeg, encode_png
from stages.runtime import Runtime
from stages.settings import Settings

MODELS = {"image_embedder": "patches"}
FACE = np.ascontiguousarray(data.astronaut()[:224, 100:324])
MASK = np.zeros((224, 224), np.uint8)
MASK[32:200, 48:184] = 1


def rows(*pairs: tuple[np.ndarray, np.ndarray]) -> pa.Table:
    faces, masks = [encode_jpeg(face, 99) for face, _ in pairs], [encode_png(mask) for _, mask in pairs]
    known = {"face": faces, "mask": masks, "image": faces, "sha256": [sha256(face) for face in faces]}
    return pa.table(known, schema=schema(EmbedImage.reads))


def run(*pairs: tuple[np.ndarray, np.ndarray], **told: object) -> pa.Table:
    embedded = EmbedImage(Settings.model_validate({"models": MODELS} | told), Runtime())(rows(*pairs))
    assert embedded[DROP].null_count == embedded.num_rows
    return embedded.drop_columns([DROP])


@pytest.fixture(scope="module")
def embedded() -> pa.Table:
    return run((FACE, MASK), (FACE[:, ::-1], MASK))


def vector(table: pa.Table, name: str = "clip", row: int = 0) -> np.ndarray:
    return decode_npy(table[name][row].as_py())


def test_columns_are_as_declared(embedded: pa.Table) -> None:
    check(embedded, EmbedImage.writes, "embed_image")
    assert (vector(embedded).shape, vector(embedded).dtype) == ((1024,), np.float16)
    hidden = vector(embedded, "clip_hidden")
    assert (hidden.shape, hidden.dtype) == ((257, 1280), np.float16)
    assert np.isfinite(hidden).all()
    assert embedded["dino"].null_count == 2


def test_the_background_does_not_matter(embedded: pa.Table) -> None:
    # 16 px around the face stay, since JPEG spreads what lies in its 8 px blocks.
    elsewhere = FACE.copy()
    elsewhere[:16] = elsewhere[216:] = (255, 0, 0)
    elsewhere[:, :32] = elsewhere[:, 200:] = (0, 0, 255)
    assert (vector(run((elsewhere, MASK))) == vector(embedded)).all()
    inside = FACE.copy()
    inside[90:130, 90:130] = 0
    assert (vector(run((inside, MASK))) != vector(embedded)).any()


def test_fill_and_labels_are_the_configured_ones(embedded: pa.Table) -> None:
    assert (vector(run((FACE, MASK), segment={"fill": (0, 0, 0)})) != vector(embedded)).any()
    nothing_kept = run((FACE, MASK), (255 - FACE, MASK), segment={"keep": (17,)})
    assert (vector(nothing_kept) == vector(nothing_kept, row=1)).all()


def test_the_plain_face_is_embedded_in_files_of_its_own(embedded: pa.Table) -> None:
    elsewhere = FACE.copy()
    elsewhere[:16] = (255, 0, 0)
    for encode, names in ({}, ("clip", "clip_hidden")), ({"mirror": True}, ("clip_mirror", "clip_hidden_mirror")):
        both = run((FACE, MASK), (elsewhere, MASK), segment={"condition": "both"}, encode=encode)
        plain = run((FACE, MASK), (elsewhere, MASK), segment={"condition": "plain"}, encode=encode)
        check(both, EmbedImage.writes, "embed_image")
        whole = run((FACE, np.ones_like(MASK)), segment={"keep": range(19)}, encode=encode)
        for name in names:
            alike = name.replace("clip", "clip_plain", 1).replace("clip_plain_hidden", "clip_hidden_plain")
            assert plain[name].null_count == 2
            assert plain[alike] == both[alike]
            assert plain[alike][0] == whole[name][0]
            assert plain[alike][0] != plain[alike][1]
            assert both[name][0] == both[name][1]
    assert both["clip"][0] == embedded["clip"][0]


def test_a_vector_does_not_depend_on_its_batch(embedded: pa.Table) -> None:
    alone = run((FACE[:, ::-1], MASK))
    for name in ("clip", "clip_hidden"):
        assert alone[name][0] == embedded[name][1]
        assert embedded[name][0] != embedded[name][1]
    assert run().num_rows == 0


class Counter:
    """Notes the sizes of the batches that it is given."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def embed(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.sizes.append(len(images))
        return {"dino": np.zeros((len(images), 257, 8), np.float16)}


@pytest.mark.parametrize(("device", "sizes"), [("cpu", [1, 1, 1]), ("cuda", [3])])
def test_batches_on_a_gpu_only(device: str, sizes: list[int]) -> None:
    stage = EmbedImage(Settings.model_validate({"models": MODELS}), Runtime(device=device))
    stage._embedder = counter = Counter()
    result = stage(rows(*[(FACE, MASK)] * 3))
    assert counter.sizes == sizes
    assert result["dino"].null_count == 0
    assert result["clip"].null_count == 3


INT8 = {"pack": {"hidden": "int8"}}


def test_tokens_in_int8_are_those_of_float16_and_all_else_is_as_before(embedded: pa.Table) -> None:
    mirrored = {"encode": {"mirror": True}}
    usual, found = run((FACE, MASK), **mirrored), run((FACE, MASK), **mirrored, **INT8)
    check(found, EmbedImage.writes, "embed_image")
    for name in ("clip_hidden", "clip_hidden_mirror"):
        assert found[name].null_count == 1
        int8, scale = decode_int8(found[f"{name}_int8"][0].as_py())
        expected = quantise(vector(usual, name))
        assert (int8 == expected.int8).all()
        assert (scale == expected.scale).all()
    for name in ("clip", "clip_mirror"):
        assert found[name] == usual[name]
    assert all(usual[name].null_count == 1 for name in EmbedImage.writes if name.endswith("_int8"))


def test_tokens_of_dino_are_stored_in_int8_too() -> None:
    stage = EmbedImage(Settings.model_validate({"models": MODELS} | INT8), Runtime())
    stage._embedder = Counter()
    result = stage(rows((FACE, MASK)))
    assert decode_int8(result["dino_int8"][0].as_py()).shape == (257, 8)
    assert result["dino"].null_count == 1
