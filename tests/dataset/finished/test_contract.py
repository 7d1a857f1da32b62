"""What the contract says of a sample and of dataset.json, without any file."""

import io
import json

import fake_dataset as fake
import numpy as np
import pytest

from pipeline.dataset.finished.contract import dataset_problems, encoded_problems, json_problems, sample_problems
from pipeline.shared.tars import Sample
from schemas.buckets import Fit
from schemas.columns import LEDGER
from schemas.digest import sha256_of_json
from schemas.shard import dataset_text, encode_npy, sample_files, sample_sha256
from schemas.targets import Targets
from stages.pixels.images import encode_jpeg, encode_png

FIRST = "a-000000000"
FACE = fake.drawn(224, 224)
UNIT = np.full(512, 512**-0.5, np.float32)

LATENTS = encode_npy(np.zeros((4, 8, 8), np.float16))
TEXT, POOLED = encode_npy(np.zeros((77, 32), np.float16)), encode_npy(np.zeros(32, np.float16))


@pytest.fixture(scope="module")
def row():
    return fake.record("a", 0)


def problems(row, files):
    ledger = {name: row.get(name) for name in LEDGER} | {"sample_sha256": sample_sha256(files)}
    return list(sample_problems(Sample(FIRST, files), ledger))


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def grown(data, **changes):
    return json.dumps(json.loads(data) | changes).encode()


def cropped(**sizes):
    return fake.CROPS | {name: {"size": size} for name, size in sizes.items()}


def test_what_the_stages_write_fits_the_contract(row):
    files = sample_files(row)
    assert problems(row, files) == problems(row, {**files, "dino_mirror.npy": files["dino.npy"]}) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("json", None, "missing files: json"),
        ("face.jpg", None, "missing files: face.jpg"),
        ("mask.png", None, "missing files: mask.png"),
        ("arcface.npy", None, "missing files: arcface.npy"),
        ("dino.npy", None, "no image features"),
        ("portrait.jpg", None, "portrait.jpg is absent, and json does not say why"),
        ("extra.bin", lambda old: b"x", "unknown files: extra.bin"),
        ("half.jpg", lambda old: encode_jpeg(FACE, 90), "json does not give the size of half.jpg"),
        ("face.jpg", lambda old: encode_png(FACE), "face.jpg is not a JPEG"),
        ("face.jpg", lambda old: encode_jpeg(fake.drawn(112, 224), 90), "face.jpg is 112 x 224 pixels"),
        ("face.jpg", lambda old: old[:-40], "face.jpg cannot be decoded"),
        ("portrait.jpg", lambda old: encode_jpeg(fake.drawn(500, 500), 90), "portrait.jpg is 500 x 500 pixels"),
        ("mask.png", lambda old: encode_png(FACE), "mask.png is not a map of 19 labels"),
        ("mask.png", lambda old: encode_png(np.full((224, 224), 19, np.uint8)), "mask.png is not a map of 19 labels"),
        ("mask.png", lambda old: encode_png(np.zeros((224, 223), np.uint8)), "mask.png is 223 x 224 pixels"),
        ("mask.png", lambda old: old[:-12], "mask.png cannot be decoded"),
        ("arcface.npy", lambda old: npy(UNIT.astype(np.float64)), "arcface.npy is not an npy of float32 (512,)"),
        ("arcface.npy", lambda old: npy(np.array([{}] * 512)), "arcface.npy is not an npy"),
        ("arcface.npy", lambda old: npy(UNIT.reshape(1, 512)), "arcface.npy is not an npy"),
        ("arcface.npy", lambda old: npy(UNIT * 1.01), "arcface.npy has the length 1.0100"),
        ("arcface.npy", lambda old: npy(UNIT * np.nan), "arcface.npy holds numbers that are not finite"),
        ("arcface.npy", lambda old: old + b"\0", "arcface.npy is not an npy"),
        ("dino.npy", lambda old: npy(np.full((257, 4), np.inf, np.float16)), "dino.npy holds numbers"),
        ("dino.npy", lambda old: npy(np.zeros((256, 4), np.float16)), "dino.npy is not an npy"),
        ("dino.npy", lambda old: b"", "dino.npy is not an npy"),
        ("dino_mirror.npy", lambda old: npy(np.ones((257, 3), np.float16)), "dino_mirror.npy has not the shape of din"),
        ("dino_mirror.npy", lambda old: npy(np.ones((256, 2), np.float16)), "dino_mirror.npy is not an npy"),
        ("clip_mirror.npy", lambda old: npy(np.zeros(1024, np.float16)), "clip_mirror.npy has not the shape of clip"),
        ("latents.full.npy", lambda old: LATENTS, "json does not say what encoded latents.full.npy"),
        ("text.npy", lambda old: TEXT[1:], "text.npy is not an npy of float16 (77, -1)"),
        ("json", lambda old: grown(old, targets={}), "targets cannot be read"),
        ("json", lambda old: b"{", "json cannot be parsed"),
        ("json", lambda old: b"[" * 100_000, "json cannot be parsed"),
        ("json", lambda old: b"[]", "json is not an object"),
        ("json", lambda old: b"{}", "json lacks key, part"),
        ("json", lambda old: grown(old, key="a-000000004"), "json is that of the key 'a-000000004'"),
        ("json", lambda old: grown(old, width=1281), "json and ledger differ in width"),
        ("json", lambda old: grown(old, bbox=[400.0, 200.0, 700.0, 600.001]), "json and ledger differ in bbox"),
        ("json", lambda old: grown(old, kps="x"), "json and ledger differ in kps"),
        ("json", lambda old: grown(old, url=None), "json and ledger differ in url"),
        ("json", lambda old: grown(old, schema_version=2), "json has the schema version 2"),
        ("json", lambda old: grown(old, crops=None), "json does not describe portrait.jpg"),
        ("json", lambda old: grown(old, crops=cropped(portrait=[600, 500])), "portrait.jpg is not square"),
        ("json", lambda old: grown(old, crops=cropped(full=[1e9, "x"])), "json does not give the size of full.jpg"),
    ],
)  # fmt: skip
def test_a_sample_that_breaks_the_contract(row, name, content, message):
    files = sample_files(row)
    old = files.pop(name, b"")
    if content:
        files[name] = content(old)
    assert any(message in text for text in problems(row, files)), problems(row, files)
    if name == "json" and content:
        ledger = {column: row.get(column) for column in LEDGER}
        assert any(message in text for text in json_problems(Sample(FIRST, files), ledger))


def test_a_sample_that_is_not_the_ledgers(row):
    files = sample_files(row)
    assert list(sample_problems(Sample(FIRST, files), None)) == ["the ledger does not keep it"]
    changed = {**files, "face.jpg": encode_jpeg(FACE, 80)}
    ledger = {name: row.get(name) for name in LEDGER} | {"sample_sha256": sample_sha256(files)}
    (message,) = sample_problems(Sample(FIRST, changed), ledger)
    assert "sample_sha256" in message


FULL = {"full": Fit((80, 64), (0, 0), (64, 64))}


@pytest.mark.parametrize(
    ("kind", "latents", "files", "message"),
    [
        ("sd15", FULL, {"latents.full.npy": LATENTS, "text.npy": TEXT}, None),
        ("sdxl", {}, {"text.npy": TEXT, "text_pooled.npy": POOLED}, None),
        ("sd15", {}, {"text.npy": TEXT, "text_pooled.npy": POOLED}, "are not those of sd15"),
        ("sdxl", {}, {"text.npy": TEXT}, "are not those of sdxl"),
        ("sd15", FULL, {}, "latents.full.npy, full.jpg and json do not go together"),
        ("sd15", {}, {"latents.full.npy": LATENTS}, "do not go together"),
        ("sd15", {"half": FULL["full"]}, {"latents.half.npy": LATENTS}, "latents.half.npy, half.jpg"),
        ("sd15", FULL, {"latents.full.npy": LATENTS[:-2]}, "latents.full.npy is not an npy of float16 (4, 8, 8)"),
        ("sd15", FULL, {"latents.full.npy": npy(np.zeros((4, 8, 8), np.float32))}, "float16 (8, 8, 8)"),
        ("sd15", FULL, {"latents.full.npy": npy(np.full((4, 8, 8), np.inf, np.float16))}, "not finite"),
        (None, {}, {"latents.full.npy": LATENTS}, "json does not say what encoded latents.full.npy"),
        (None, {}, {}, None),
    ],
)
def test_latents_and_text_embeddings_are_those_that_json_describes(kind, latents, files, message):
    sample = Sample(FIRST, {"full.jpg": b"", **files})
    described = kind and json.loads(Targets("base", kind, "aa", "bb", 64, latents).to_json())
    found = list(encoded_problems(sample, described))
    assert (message is None) == (found == [])
    assert all(message in text for text in found)


def test_dataset_json_is_checked_without_its_shards_too():
    plan = {"schema_version": 1, "profile": "embedded"}
    whole = {**plan, "plan_digest": sha256_of_json(plan), "plan": plan}
    assert list(dataset_problems(whole, dataset_text(whole), None)) == []
    changed = {**whole, "profile": "other", "shards": [], "files": {"x": {}}}
    assert list(dataset_problems(changed, dataset_text(whole), None)) == [
        "profile is not that of its plan",
        "the text is not that of a dataset.json as it was written",
        "it lacks dataset_digest, dropped, kept, rows_in",
        "it names the file 'x', which no dataset has",
    ]
