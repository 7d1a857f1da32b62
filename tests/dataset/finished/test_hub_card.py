"""README.md and croissant.json of a dataset: what `datasets` and mlcroissant make of them, and what people read."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import fake_shards
import numpy as np
import pytest

from pipeline.dataset.finished.forget import forget
from pipeline.dataset.finished.hub import about
from pipeline.dataset.finished.hub.card import write_card
from pipeline.dataset.finished.hub.croissant import croissant
from pipeline.dataset.finished.verify import foreign_files
from pipeline.dataset.job import Job
from pipeline.dataset.out.ledger import Funnel, FunnelRow, read_ledger, read_manifests, shard_names
from pipeline.dataset.source.laion import is_old_laion
from pipeline.dataset.source.parts import Part
from pipeline.shared.tars import Sample, unpack
from schemas.errors import CorruptShardError, OutputError
from schemas.names import fitting_name, part_name
from schemas.shard import SUFFIXES, decode_npy


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`load_dataset`, whose cache is this test's own."""
    import datasets

    datasets.disable_progress_bars()
    return lambda out, *words, **options: datasets.load_dataset(
        str(out), *words, split="train", cache_dir=str(tmp_path / "cache"), **options
    )


def counted(out: Path, kept: int) -> Funnel:
    return Funnel(tuple(read_manifests(out)), kept, (FunnelRow("pack", kept, {}),))


def test_croissant_names_a_reason_of_several_stages_once(dataset):
    rows = (FunnelRow("metadata", 9, {"small_image": 2}), FunnelRow("size", 7, {"small_image": 3, "no_face": 1}))
    known = about.About.of(dataset, Funnel(tuple(read_manifests(dataset)), 9, rows))
    assert (
        json.loads(croissant(known))["rai:dataCollectionMissingData"]
        == "Rows that were dropped, by reason: small_image 5, no_face 1."
    )


@pytest.mark.parametrize("streaming", [True, pytest.param(False, marks=pytest.mark.long)])
def test_datasets_load_every_sample_whole_by_the_card(dataset, load, streaming):
    rows = list(load(dataset, streaming=streaming))
    samples = [one for shard in shard_names(dataset) for one in unpack(dataset / "shards" / f"{shard}.tar")]
    assert [row["json"]["key"] for row in rows] == [one.key for one in samples]
    assert any(row["half.jpg"] is None for row in rows)
    for row, sample in zip(rows, samples, strict=True):
        content = json.loads(sample.files["json"])
        assert (row["json"]["text"], row["json"]["sha256"]) == (content["text"], content["sha256"])
        assert row["json"]["crops"]["half"]["absent"] == content["crops"]["half"].get("absent")
        assert [name for name in row if row[name] is not None] == sorted(["__key__", "__url__", *sample.files])
        assert row["mask.png"].mode == "L"
        for name in ("arcface.npy", "clip_hidden.npy"):
            np.testing.assert_array_equal(row[name], decode_npy(sample.files[name]))


def test_what_is_computed_ahead_is_declared_and_large_rows_have_a_config_of_their_own(tmp_path, load, monkeypatch):
    mask = {"mask.png": fake_shards.picture(8, 8)}
    samples = [fake_shards.in_int8(fake_shards.encoded(n, mirror=True)) | mask for n in range(3)]
    out = Path(fake_shards.write(tmp_path / "out", {"part-00000": samples}))
    monkeypatch.setattr(about, "_VIEWED_BYTES", max(sum(map(len, files.values())) for files in samples) - 1)
    write_card(out, counted(out, 3))
    light, whole = (next(iter(load(out, name, streaming=True))) for name in ("default", "everything"))
    assert {"clip_hidden.safetensors", "latents.full.npy", "text.npy"} <= set(whole) - set(light)
    assert {"clip.npy", "portrait.jpg", "json"} <= set(light)
    assert whole["clip_hidden.safetensors"] == samples[0]["clip_hidden.safetensors"]
    np.testing.assert_array_equal(whole["latents.full.npy"], decode_npy(samples[0]["latents.full.npy"]))
    assert whole["json"]["targets"]["latents"]["full"]["size"] == [80, 48]


def test_a_dataset_that_kept_nothing_says_so_and_has_no_rows(tmp_path, load):
    out = Path(fake_shards.write(tmp_path / "out", {"part-00000": []}))
    write_card(out, counted(out, 0))
    assert "\n**No photo was kept: there is no sample to load.**" in (out / "README.md").read_text()
    assert list(load(out, streaming=True)) == []


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:rdflib")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves files open
@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")  # how mlcroissant unpacks a tar
def test_mlcroissant_finds_nothing_to_warn_of_and_reads_the_kept_samples(dataset, tmp_path, monkeypatch, caplog):
    import mlcroissant
    from mlcroissant._src.operation_graph.operations import extract

    monkeypatch.setattr(extract, "EXTRACT_PATH", type(extract.EXTRACT_PATH)(tmp_path))
    with caplog.at_level(logging.WARNING):
        described = mlcroissant.Dataset(str(dataset / "croissant.json"))
        records = {one.uuid: list(described.records(one.uuid)) for one in described.metadata.record_sets}
    assert not caplog.records
    assert not described.metadata.ctx.issues.report()
    assert described.metadata.ctx.conforms_to.value.endswith("1.1")
    kept = [key for shard in shard_names(dataset) for key in read_ledger(dataset, shard, ["key"], "kept")["key"]]
    assert [one["json/key"].decode() for one in records["json"]] == [str(key) for key in kept]
    assert [json.loads(one["json/content"])["key"] for one in records["json"]] == [str(key) for key in kept]
    assert len(records["full.jpg"]) == len(kept) > len(records["half.jpg"]) > 0
    assert records["mask.png"][0]["mask.png/content"].mode == "L"
    assert described.metadata.data_limitations
    assert described.metadata.data_collection_missing_data


def test_forget_counts_anew_and_what_the_user_wrote_stays(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    shard = next(name for name in shard_names(out) if read_ledger(out, name, ["url"], "kept").num_rows)
    url = read_ledger(out, shard, ["url"], "kept")["url"][0].as_py()
    (out / "README.md").write_text((out / "README.md").read_text() + "\nOurs: ask Ann.\n")
    before = json.loads((out / "croissant.json").read_text())
    forget(out, urls=(url,))
    text = (out / "README.md").read_text()
    assert "\n8 photos with exactly one face" in text
    assert "| **kept** | 8 |" in text
    assert text.endswith("\nOurs: ask Ann.\n")
    after = json.loads((out / "croissant.json").read_text())
    assert before["description"] != after["description"]
    assert before["distribution"] != after["distribution"]
    assert not foreign_files(out)


def test_a_readme_of_somebody_else_is_left_alone(tmp_path):
    out = Path(fake_shards.write(tmp_path / "out", {"part-00000": fake_shards.counted(0, 2)}))
    (out / "README.md").write_text("mine")
    write_card(out, counted(out, 2))
    assert (out / "README.md").read_text() == "mine"
    assert (out / "croissant.json").exists()


@pytest.mark.parametrize(
    ("path", "origin", "warned"),
    [
        ("/data/secret/laion2B-en/part-00000.parquet", "laion2B-en", True),
        ("/data/lists/part-00007-5b54c5d5-bbcf-484d-a2ce-0d6f73df1a36-c000.snappy.parquet", "lists", True),
        ("s3://key:secret@bucket/relaion2B-en/part-0.parquet?X-Signature=1", "s3://bucket/relaion2B-en", False),
        ("/data/coyo/part-0.parquet", "coyo", False),
        ("made:/data/diffusiondb/0.parquet", "made:diffusiondb", False),
    ],
)
def test_old_lists_of_laion_are_warned_of_by_card_and_croissant(tmp_path, path, origin, warned):
    is_made, path = path.startswith("made:"), path.removeprefix("made:")
    part = Part(part_name(path.partition("?")[0]), path, None, "metadata", "made" if is_made else "web")
    assert part.origin == origin
    notes = Job(SimpleNamespace(), (part,)).notes
    assert [note.startswith("WARNING") and "2,236 links" in note for note in notes] == [True] * warned, (
        "before a download"
    )
    out = Path(fake_shards.write(tmp_path / "out", {f"{part.name}-00000": fake_shards.counted(0, 1)}))
    (out / "dataset.json").write_text(json.dumps({"sources": [origin], "profile": "insightface"}))
    write_card(out, counted(out, 1))
    for name in ("README.md", "croissant.json"):
        text = (out / name).read_text()
        assert ("2,236 links" in text) is warned
        assert origin in text
        assert "secret" not in text


UUID = "part-00007-5b54c5d5-bbcf-484d-a2ce-0d6f73df1a36-c000.snappy"


@pytest.mark.parametrize(
    ("origins", "parts", "is_old"),
    [
        (["relaion2B-en", "my pictures"], ["laion-part-0", "my-pictures"], False),
        (["s3://bucket/relaion2B-en", "s3://bucket/pictures"], ["laion-part-0", "pictures"], False),
        (["relaion2B-en", "f" * 60], ["laion-part-0", fitting_name("f" * 60, SUFFIXES)], False),
        (["relaion2B-en", "made:diffusiondb"], ["laion-part-0", "0"], False),
        (["relaion2B-en", "sample"], ["laion-part-0", "sample"], False),
        (["lists", "relaion2B-en"], ["laion-part-0", part_name(UUID)], True),
        (["lists", "pictures"], ["laion-part-0", "pictures"], True),
        (["laion2B", "pictures"], ["laion2B", "pictures"], True),
        (["laion-part-0", "pictures"], ["laion-part-0", "pictures"], True),
    ],
)
def test_images_of_ones_own_beside_re_laion_are_no_old_lists(origins, parts, is_old):
    """The last two are a list in a folder of its own name, and a dataset.json without sources."""
    assert is_old_laion(origins, parts) is is_old


def test_a_run_knows_which_part_is_of_which_list():
    """Tars of images lie in a folder, as lists do: dataset.json does not tell them apart."""
    re_laion = Part("laion-part-0", "/data/relaion2B-en/0.parquet", None, "metadata")
    tar = Part("00000", "/data/pictures/00000.tar", None, "tar")
    old = Part("laion-part-1", "/data/lists/1.parquet", None, "metadata")
    assert Job(SimpleNamespace(), (re_laion, tar)).notes == []
    assert len(Job(SimpleNamespace(), (re_laion, tar, old)).notes) == 1


def test_files_that_no_release_writes_are_no_features():
    sample = Sample("a-000000000", {"json": b"{}", "face.jpg": b"", "note|.jpg": b"", "\udcff": b""})
    assert [one["name"] for one in about.features([sample])] == ["__key__", "__url__", "face.jpg", "json"]


def test_a_folder_in_the_way_is_named(tmp_path):
    out = Path(fake_shards.write(tmp_path / "out", {"a-00000": fake_shards.counted(0, 1)}))
    (out / "croissant.json").mkdir()
    with pytest.raises(OutputError, match=r"croissant\.json cannot be written: Is a directory"):
        write_card(out, counted(out, 1))


def test_a_manifest_that_names_no_tar_is_damage(tmp_path):
    out = Path(fake_shards.write(tmp_path / "out", {"a-00000": fake_shards.counted(0, 1)}))
    (out / "dataset.json").write_text(json.dumps({"profile": "insightface"}))
    manifest = json.loads((out / "shards" / "a-00000.json").read_text())
    (out / "shards" / "a-00000.json").write_text(json.dumps({**manifest, "files": {}}))
    with pytest.raises(CorruptShardError, match=r"a-00000\.json: it names no tar"):
        write_card(out, counted(out, 1))
