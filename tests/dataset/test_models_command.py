"""`python -m pipeline models list | check`: enough to prepare a machine that has no network."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from typing import Any

import numpy as np
import pytest
import tiny_captioners
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset import check_models
from pipeline.dataset.check_models import measured
from pipeline.dataset.needed_weights import known_models
from pipeline.shared.bases import BASES
from stages.models import REGISTRIES
from stages.models.backends import backend
from stages.settings import ModelSettings

ALL = known_models(ModelSettings())
MODEL = {
    **dict.fromkeys(("name", "state", "target", "licence", "page", "revision", "paper", "preprocessing"), str),
    **dict.fromkeys(("tasks", "used_by", "downloads", "files"), list),
    **dict.fromkeys(("ready", "commercial", "archive"), bool),
    **dict.fromkeys(("path", "repository", "made_of"), str | None),
}
DOWNLOAD = {"url": str, "bytes": int | None, "sha256": str | None}
FILE = {"name": str, "task": str | None, "path": str, "bytes": int | None, "sha256": str | None}
CHECK = {
    **dict.fromkeys(("weights", "state", "task", "backend", "runtime", "problem"), str),
    **dict.fromkeys(("milliseconds", "batch_difference"), float | None),
}


@pytest.fixture(autouse=True)
def nothing(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("FACESHARDS_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "models"


def in_a_pipe(*words: str) -> str:
    return CliRunner().invoke(app, words, env={"COLUMNS": "80"}).stdout


def on_a_terminal(*words: str) -> str:
    """What a terminal of 80 columns gets."""
    command = [sys.executable, "-m", "pipeline", *words]
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with subprocess.Popen(command, stdin=writer, stdout=writer, stderr=writer) as process:
        os.close(writer)
        pieces = []
        try:
            while piece := os.read(reader, 65536):
                pieces.append(piece)
        except OSError:  # how Linux says that the last writer is gone
            pass
    os.close(reader)
    assert process.returncode == 0
    return b"".join(pieces).decode().replace("\r\n", "\n")


@pytest.mark.parametrize("read", [in_a_pipe, pytest.param(on_a_terminal, marks=pytest.mark.long)])
def test_nothing_of_the_list_is_cut(read, nothing):
    lines = read("models", "list").splitlines()
    text = "\n".join(lines)
    assert "…" not in text
    for weight in known_models(ModelSettings()).values():
        assert f"{weight.name}: missing" in lines
        assert f"  licence: {weight.licence}" in lines
        for file in weight.downloads:
            assert f"  fetch {weight.url(file)}" in lines
        for file, path in weight.paths(weight.under(nothing)).items():
            assert f"    to {path}" in lines
            assert weight.made_of or f"    sha256 {file.sha256 or 'not known'}" in lines
            assert not file.bytes or f"    {file.bytes:,} bytes" in lines
    assert f"{len(ALL)} of {len(ALL)} are missing" in lines[-1]


def listed(*words: str) -> Any:
    result = CliRunner().invoke(app, ["models", "list", "--json", *words])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json_is_for_programs():
    document = listed()
    assert set(document) == {"models", "backends", "searched", "missing", "bytes_missing"}
    assert [entry["name"] for entry in document["models"]] == document["missing"] == list(ALL)
    for entry in document["models"]:
        shaped(entry, MODEL)
        for download in entry["downloads"]:
            shaped(download, DOWNLOAD)
            assert download["url"].startswith("https://")
        for file in entry["files"]:
            shaped(file, FILE)
            assert file["sha256"] and file["bytes"] if file["task"] and not entry["made_of"] else True
        assert entry["used_by"]
        assert len(entry["downloads"]) == (1 if entry["archive"] else len(entry["files"])) or entry["made_of"]
    sizes = {download["url"]: download["bytes"] or 0 for entry in document["models"] for download in entry["downloads"]}
    assert document["bytes_missing"] == sum(sizes.values())


def shaped(value: dict[str, Any], shape: dict[str, Any]) -> None:
    assert set(value) == set(shape)
    for name, kind in shape.items():
        assert isinstance(value[name], kind), name


def test_every_registered_backend_is_listed_with_its_weights():
    document, output = listed(), CliRunner().invoke(app, ["models", "list"]).output
    for task, name in [(task, name) for task, names in REGISTRIES.items() for name in names]:
        (entry,) = [one for one in document["backends"] if (one["task"], one["name"]) == (task, name)]
        assert entry["weights"] == [weight.name for weight in backend(task, name).weights(ModelSettings())]
        assert set(entry["weights"]) <= {one["name"] for one in document["models"]}
        assert f"models.{task}={name}: " in output


@pytest.mark.parametrize("name", BASES)
def test_bases_are_listed_with_all_their_files_and_where_they_are(name, nothing):
    from pipeline.shared.bases import find_base

    (entry,) = listed(name)["models"]
    assert entry["state"] == "missing"
    folder = find_base("tiny-sdxl" if name == "sdxl" else "tiny").folder
    nothing.mkdir()
    (nothing / name).symlink_to(folder)
    (entry,) = listed(name)["models"]
    assert (entry["state"], entry["path"]) == ("found", str(nothing / name))
    needed = {str(path.relative_to(folder)) for path in folder.rglob("*.*") if "tokenizer" not in path.parent.name}
    assert {file["name"] for file in entry["files"] if "tokenizer" not in file["name"]} == needed - {"model_index.json"}


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--profile", "insightface"], ["buffalo_l", "bisenet", "clip-vit-h"]),
        (["--profile", "permissive"], ["yunet", "auraface", "clip-vit-h"]),
        (["--profile", "embedded"], []),
        (["--set", "models.fiqa=ediffiqa-t"], ["buffalo_l", "bisenet", "ediffiqa-t", "clip-vit-h"]),
        (["--set", "encode.latents=true"], ["buffalo_l", "bisenet", "clip-vit-h", "sd15"]),
        (
            ["--set", "pack.embeddings=false", "--set", "models.screen=buffalo_sc"],
            ["buffalo_l", "buffalo_sc", "bisenet"],
        ),
    ],
)
def test_a_profile_or_config_lists_what_it_needs(words, names):
    document = listed(*words)
    assert document["missing"] == names
    output = CliRunner().invoke(app, ["models", "list", *words]).output
    assert (f"models fetch {' '.join(names)}`" in output) == bool(names)
    assert {one["task"] for one in document["backends"]} == {*REGISTRIES} - (
        {"fiqa"} if "ediffiqa-t" not in names else set()
    )


def test_an_unknown_name_is_one_sentence():
    result = CliRunner().invoke(app, ["models", "list", "sd51"])
    assert "sd15" in str(result.exception)


def checked(*words: str, code: int = 0) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["models", "check", "--json", *words])
    assert result.exit_code == code, result.output
    checks: list[dict[str, Any]] = json.loads(result.stdout)
    for check in checks:
        shaped(check, CHECK)
    return checks


@pytest.fixture
def small(monkeypatch):
    """What models are checked with has fewer pixels."""
    for task in ("detector", "segmenter", "captioner"):
        monkeypatch.setitem(check_models._SIDE, task, check_models._SIDE[task] // 4)


def test_check_loads_each_model_and_says_how_fast_it_is(small):
    done = checked("--profile", "embedded")
    assert [(one["backend"], one["runtime"]) for one in done] == [
        ("haar", "opencv cpu"),
        ("grabcut", "opencv cpu"),
        ("lbp", "opencv cpu"),
        ("patches", "numpy cpu"),
    ]
    for one in done:
        assert one["milliseconds"] > 0
        assert one["batch_difference"] == 0


@pytest.mark.long
def test_the_captioner_is_listed_and_loaded(tmp_path, small):
    words = ["--profile", "embedded", "--set", f"models.captioner={tiny_captioners.write(tmp_path / 'git', 'git')}"]
    words += ["--set", "caption.max_tokens=4"]
    (*_, check) = checked(*words)
    assert (check["weights"], check["task"], check["runtime"], check["batch_difference"]) == (
        "git", "captioner", "torch cpu", 0
    )  # fmt: skip
    listed = CliRunner().invoke(app, ["models", "list", *words]).stdout
    assert re.search(rf"models.captioner={tmp_path}/git: git \(mit, sha256 \w{{64}}\)\n", listed)
    assert "models.segmenter=grabcut: grabcut (Apache-2.0, no weights)\n" in listed
    (broken,) = [
        one for one in checked("--set", f"models.captioner={tmp_path}/no", code=2) if one["task"] == "captioner"
    ]
    assert "neither a folder of transformers" in broken["problem"]


@pytest.mark.long
@pytest.mark.real_data
def test_check_tells_runtimes_and_providers_apart(data, small):
    words = ["models.segmenter=grabcut", "models.image_embedder=patches", f"models.pack={data / 'models/real'}"]
    sets = [word for pair in [*words, "models.runtime.detector=torch"] for word in ("--set", pair)]
    on_torch, _, on_onnx, _ = checked(*sets)
    assert (on_torch["weights"], on_torch["runtime"]) == ("real/det_2.5g.onnx", "torch cpu")
    assert (on_onnx["weights"], on_onnx["runtime"]) == ("real/w600k_mbf_int8.onnx", "onnxruntime CPUExecutionProvider")
    assert on_torch["batch_difference"] == on_onnx["batch_difference"] == 0


@pytest.mark.real_data
def test_a_pack_by_its_folder_is_listed_with_its_files(data):
    (entry, *_) = listed("--set", f"models.pack={data / 'models/real'}", "--set", "models.segmenter=grabcut")[
        "backends"
    ]
    (card,) = entry["cards"]
    assert (card["name"], card["commercial"], card["sha256"][:16]) == ("real/det_2.5g.onnx", False, "041f73f47371333d")


@pytest.mark.long
@pytest.mark.real_data
def test_check_without_words_looks_at_what_is_there(data, monkeypatch):
    assert checked() == []
    monkeypatch.setenv("FACESHARDS_MODELS", str(data / "models/extra"))
    (yunet,) = checked()
    assert (yunet["weights"], yunet["state"], yunet["task"]) == ("yunet", "verified", "detector")


def test_check_of_what_is_missing_or_cannot_be_loaded_ends_with_2(nothing):
    missing = checked("--profile", "permissive", code=2)
    assert [one["problem"] for one in missing if one["problem"]] == [
        "yunet is missing",
        "auraface is missing",
        "clip-vit-h is missing",
    ]
    nothing.mkdir()
    (nothing / "junk.onnx").write_bytes(b"junk")
    (junk,) = checked("yunet", "--set", f"models.paths.yunet={nothing / 'junk.onnx'}", code=2)
    assert "cannot be loaded by OpenCV" in junk["problem"]


class Mixing:
    """A face embedder whose vectors hold something of the other faces of a batch."""

    def embed(self, faces):
        own = faces.reshape(len(faces), -1)[:, :512].astype(np.float32)
        return own + own.mean(axis=0)


def test_a_model_that_mixes_the_images_of_a_batch_is_seen():
    assert measured("face_embedder", Mixing())[1] > 0.1
