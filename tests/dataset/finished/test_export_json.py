"""The list form: what the published scripts would read from it, and what is refused."""

import json
import pickle
import resource
from pathlib import Path

import fake_dataset as fake
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset.finished.export_json import export_json
from pipeline.shared.tars import unpack
from schemas.errors import CorruptShardError, LostError, OutputError
from schemas.shard import decode_npy
from stages.pixels.images import decode_jpeg

ALL_ABSENT = {name: {"absent": "too small"} for name in ("portrait", "half", "full")}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    no_full = {"full": None, "crops": json.dumps({**fake.CROPS, "full": {"absent": "too small"}})}
    nothing = {"full": None, "portrait": None, "crops": json.dumps(ALL_ABSENT)}
    rows = [
        fake.record("a", 0, text='a "quoted" caption\nüber zwei Zeilen'),
        fake.dead("a", 1, "metadata", "unsafe"),
        fake.record("a", 2, **no_full),
        fake.record("a", 3, **nothing),
    ]
    folder = tmp_path_factory.mktemp("dataset")
    return fake.write(folder, {"a-00000": rows, "b-00000": [fake.record("b", 0)]})


@pytest.fixture(scope="module")
def samples(out) -> dict[str, dict[str, bytes]]:
    return {sample.key: sample.files for path in (out / "shards").glob("*.tar") for sample in unpack(path)}


def key_of(entry: dict[str, str]) -> str:
    return Path(entry["image_file"]).stem


def test_the_list_names_files_that_hold_what_the_shards_hold(out, samples, tmp_path):
    done = export_json(out, tmp_path / "list")
    entries = json.loads((tmp_path / "list" / "data.json").read_text(encoding="utf-8"))
    assert done == (3, 1)
    assert [key_of(entry) for entry in entries] == ["a-000000000", "a-000000002", "b-000000000"]
    assert entries[0]["text"] == 'a "quoted" caption\nüber zwei Zeilen'
    for entry in entries:
        files = samples[key_of(entry)]
        told = {name: tmp_path / "list" / entry[name] for name in entry if name.endswith("_file")}
        assert set(entry) == {"image_file", "text", "id_embed_file", "face_image_file", "id_embed_norm"}
        assert not any(Path(entry[name]).is_absolute() for name in told)
        assert told["face_image_file"].read_bytes() == files["face.jpg"]
        assert (np.load(told["id_embed_file"]) == decode_npy(files["arcface.npy"])).all()
        assert entry["id_embed_norm"] == 21.25
    assert decode_jpeg((tmp_path / "list" / entries[0]["image_file"]).read_bytes()).shape == (512, 640, 3)
    assert not list((tmp_path / "list").rglob(".tmp-*"))


@pytest.mark.parametrize(("crop", "sizes"), [("full", [640, 300]), ("portrait", [300, 300]), ("half", [640, 300])])
def test_the_asked_crop_else_the_largest(out, tmp_path, crop, sizes):
    export_json(out, tmp_path / "list", crop)
    entries = json.loads((tmp_path / "list" / "data.json").read_text())
    widths = [decode_jpeg((tmp_path / "list" / entry["image_file"]).read_bytes()).shape[1] for entry in entries[:2]]
    assert widths == sizes


def test_the_published_way_of_reading_works_with_the_documented_switches(out, samples, tmp_path, monkeypatch):
    export_json(out, tmp_path / "list", id_format="pt-numpy", absolute=True)
    monkeypatch.chdir(tmp_path)
    entry = json.loads(Path("list/data.json").read_text())[0]
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(entry["id_embed_file"], map_location="cpu")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.warns(UserWarning, match="forcing weights_only"):
        loaded = torch.from_numpy(torch.load(entry["id_embed_file"], map_location="cpu"))
    assert loaded.tolist() == decode_npy(samples["a-000000000"]["arcface.npy"]).tolist()
    assert all(Path(entry[name]).is_file() for name in ("image_file", "face_image_file"))


def test_a_folder_that_is_not_empty_and_a_dir_that_is_no_dataset_are_refused(out, tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        export_json(out, tmp_path)
    with pytest.raises(OutputError, match="cannot be written"):
        export_json(out, tmp_path / "kept" / "list")
    with pytest.raises(OutputError, match="no dataset"):
        export_json(tmp_path, tmp_path / "list")
    (tmp_path / "empty" / "shards").mkdir(parents=True)
    with pytest.raises(OutputError, match="no finished shard"):
        export_json(tmp_path / "empty", tmp_path / "list")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "kept"]


def test_a_disk_that_is_full_is_one_sentence_and_there_is_no_list(out, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(LostError, match="cannot be written any more"):
            export_json(out, tmp_path / "list")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "list").glob("*.json"))


def test_a_tar_of_another_length_is_named_before_anything_is_written(tmp_path):
    out = fake.write(tmp_path / "out", {"a-00000": [fake.record("a", 0)]})
    with (out / "shards" / "a-00000.tar").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CorruptShardError, match=r"a-00000\.tar"):
        export_json(out, tmp_path / "list")
    assert not (tmp_path / "list").exists()


def test_a_sample_that_is_not_whole_is_named_and_there_is_no_list(tmp_path):
    out = fake.write(tmp_path / "out", {"a-00000": [fake.record("a", 0), fake.record("a", 1, face=None)]})
    with pytest.raises(CorruptShardError, match=r"a-00000\.tar: a-000000001"):
        export_json(out, tmp_path / "list")
    assert not (tmp_path / "list" / "data.json").exists()


def test_the_command_tells_what_it_wrote(out, tmp_path):
    words = ["export-json", str(out), "--out", str(tmp_path / "list"), "--crop", "portrait", "--id-format", "pt-numpy"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "3 samples" in done.output
    assert "1 samples have no crop" in done.output
    assert len(list((tmp_path / "list" / "ids").glob("*.bin"))) == 3
    assert CliRunner().invoke(app, [*words[:-1], "pickle"]).exit_code == 2
