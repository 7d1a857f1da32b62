"""`pack.embeddings = false`: shards without a number that describes a face."""

import tarfile
from pathlib import Path

import fake_shards as fake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from skimage import data
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset.config import load_config
from pipeline.dataset.finished.export_json import export_json
from pipeline.dataset.finished.verify import verify
from pipeline.dataset.plan import make_plan
from pipeline.train.loader.dataset import open_dataset
from pipeline.train.loader.reading import features_of
from pipeline.train.settings import AdapterSettings, DataSettings
from schemas.columns import schema
from schemas.errors import OutputError, SourceError
from schemas.shard import EMBEDDINGS, UNCONDITIONAL
from stages.base import DROP
from stages.embed_face import EmbedFace
from stages.embed_image import EmbedImage
from stages.runtime import Runtime
from stages.settings import Settings

SETTINGS = {"models": {"face_embedder": "lbp", "image_embedder": "patches"}, "pack": {"embeddings": False}}


def test_all_columns_of_the_image_embedder_are_null_and_its_model_is_not_looked_for():
    settings = Settings.model_validate({**SETTINGS, "models": {"image_embedder": "no such model"}})
    rows = pa.table({"face": [b"x", b"y"], "mask": [b"x", b"y"]}, schema=schema(("face", "mask")))
    found = EmbedImage(settings, Runtime())(rows)
    assert found.num_rows == 2
    assert all(found[name].null_count == 2 for name in EmbedImage.writes)


def test_faces_are_judged_by_their_vector_which_then_goes():
    face = data.astronaut()[40:152, 170:282].tobytes()
    rows = pa.table({"face112": [face]}, schema=schema(("face112",)))
    with_it = EmbedFace(Settings.model_validate({**SETTINGS, "pack": {}}), Runtime())(rows)
    without = EmbedFace(Settings.model_validate(SETTINGS), Runtime())(rows)
    assert with_it["arcface"].null_count == 0
    assert without["arcface"].null_count == 1
    assert without["embedding_norm"] == with_it["embedding_norm"]
    assert without[DROP].null_count == 1


def test_the_plan_tells_and_needs_no_image_embedder():
    plan = make_plan(load_config(None, ["pack.embeddings=false"], shards="sample"))
    usual = make_plan(load_config(None, ["pack.embeddings=true"], shards="sample"))
    assert plan.identity["settings"]["pack"] == {"embeddings": False}
    assert "pack" not in usual.identity["settings"]
    assert {card.task for card in usual.cards} - {card.task for card in plan.cards} == {"image_embedder"}


def test_the_trainer_and_the_export_say_what_to_do(tmp_path):
    files = {suffix: content for suffix, content in fake.sample(0).items() if suffix not in EMBEDDINGS}
    out = fake.write(tmp_path / "out", {"a-00000": [files]})
    dataset = open_dataset([out], DataSettings())
    for role in ("arcface", "hidden"):
        with pytest.raises(SourceError, match=r"make the dataset again with --set pack\.embeddings=true"):
            features_of(dataset, [role], AdapterSettings())
    with pytest.raises(OutputError, match=r"again with --set pack\.embeddings=true"):
        export_json(Path(out), tmp_path / "list")
    assert not (tmp_path / "list").exists()


def test_a_dataset_without_embeddings(whole, tmp_path, remembered, pageless):
    words = ["dataset", "--out", str(tmp_path), "--executor", "local", "--set", "pack.embeddings=false"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert verify(tmp_path) == []
    with tarfile.open(tmp_path / "shards" / "sample-00000.tar") as tar:
        suffixes = {name.partition(".")[2] for name in tar.getnames()}
    assert {"json", "face.jpg", "mask.png", "full.jpg"} <= suffixes
    assert not suffixes & EMBEDDINGS
    assert not (tmp_path / UNCONDITIONAL).exists()
    kept = pq.read_table(tmp_path / "shards" / "sample-00000.parquet").filter(pa.compute.field("verdict") == "kept")
    assert len(kept) > 0
    assert kept["embedding_norm"].null_count == 0
