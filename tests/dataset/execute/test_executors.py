"""Whole runs: equal bytes from every executor, resuming, interruption, and what a failed shard leaves."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sample_runs import SHARDS, command, contents, forks, make, manifests, stopped, without
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset import job
from pipeline.dataset.finished.verify import verify
from pipeline.dataset.source import metadata_files
from schemas.errors import ExitCode, UserError
from stages.models.detectors.haar import Haar


def test_a_run_says_what_came_of_it_and_its_output_verifies(whole):
    assert len(contents(whole)) == 3 * len(SHARDS)
    assert verify(whole) == []
    page = (whole / "report.html").read_text()
    assert page.count("a side of the image is shorter than filter.min_image_px") == 1  # two stages drop for it


def test_a_rerun_skips_what_is_done_and_changes_nothing(whole, tmp_path):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    code, text = make(out)
    assert (code, f"{len(SHARDS)} done before" in text) == (ExitCode.OK, True)
    assert {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()} == before


def test_a_rerun_starts_neither_ray_nor_models_until_a_shard_is_to_be_made(whole, tmp_path, monkeypatch):
    out, started = Path(shutil.copytree(whole, tmp_path / "out")), []
    real = job.executor_of
    monkeypatch.setattr(job, "executor_of", lambda config: started.append(config.executor.name) or real(config))
    assert make(out)[0] == ExitCode.OK
    assert started == []
    (out / "shards" / f"{SHARDS[5]}.json").unlink()
    assert make(out)[0] == ExitCode.OK
    assert started == ["local"]
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    ("engine", "shards"),
    [("native", SHARDS[2:4]), pytest.param("img2dataset", [SHARDS[2], *SHARDS[5:]], marks=pytest.mark.long)],
    ids=["native", "img2dataset"],
)
def test_neither_batches_nor_the_engine_change_a_byte(whole, tmp_path, engine, shards):
    """Pictures of several formats; and what is not fetched."""
    pairs = ["executor.batch_rows=1", "executor.fetch_ahead=1"] if engine == "native" else []
    out = without(whole, tmp_path / "out", *shards)
    assert make(out, f"download.engine={engine}", *pairs)[0] is ExitCode.OK
    assert contents(out) == contents(whole)


def test_another_plan_is_refused_and_replan_goes_on(whole, tmp_path):
    out, other = Path(shutil.copytree(whole, tmp_path / "out")), "filter.min_face_px=100"
    with pytest.raises(UserError, match=r"filter\.min_face_px was 128\.0, is now 100\.0"):
        make(out, other)
    assert contents(out) == contents(whole)
    assert make(out, other, replan=True)[0] is ExitCode.OK
    assert verify(out) == []
    assert contents(out) != contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.long)])
def test_a_run_that_is_interrupted_or_killed_again_and_again_ends_whole(whole, tmp_path, executor):
    out = tmp_path / "out"
    if executor == "ray":
        assert stopped(out, signal.SIGINT, "--executor", "ray", "--set", "executor.workers=1")[0] == 130
    with forks() as forked:
        for sign in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
            done = len(manifests(out))
            assert forked(out, sign) == (-sign if sign == signal.SIGKILL else 130)
            assert done < len(manifests(out)) < len(SHARDS)
            assert sign == signal.SIGKILL or not list(out.rglob(".tmp-*"))
    assert make(out)[0] is ExitCode.OK
    assert contents(out) == contents(whole)
    assert not list(out.rglob(".tmp-*"))


def test_a_package_that_a_model_lacks_is_a_mistake_that_leaves_nothing(tmp_path, monkeypatch, remembered):
    """Models import theirs when they are loaded, and by then OUT is there."""

    def missing(*_):
        raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")

    monkeypatch.setattr(Haar, "__init__", missing)
    words = ["dataset", "--shards", "sample", "--out", str(tmp_path / "out"), "--executor", "local"]
    mistake = CliRunner().invoke(app, words).exception
    assert isinstance(mistake, UserError)
    assert "onnxruntime cannot be imported here (No module named 'onnxruntime'): install" in str(mistake)
    assert not (tmp_path / "out").exists()


WITHOUT_A_PACKAGE = """
from stages.models.detectors.haar import Haar

def missing(*_):
    raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")

Haar.__init__ = missing
"""


@pytest.mark.long
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_a_package_that_a_model_lacks_ends_the_process_of_a_run_as_a_mistake(whole, tmp_path, executor):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_A_PACKAGE)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])
    ended = subprocess.run(
        command(tmp_path / "out", "--executor", executor, "--set", "executor.workers=1"),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, "Traceback" in ended.stdout + ended.stderr) == (ExitCode.USER_ERROR, False), ended.stderr
    assert "error: onnxruntime cannot be imported here (No module named 'onnxruntime'): install" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_full_fails_its_shard_with_one_sentence(whole, tmp_path, monkeypatch):
    out = without(whole, tmp_path / "out", SHARDS[1])

    def detect(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nException raised from malloc")

    monkeypatch.setattr(Haar, "detect", detect)
    code, text = make(out, afresh=True)
    assert code is ExitCode.SHARDS_FAILED
    sentence = "CUDA out of memory. Tried to allocate 2.00 GiB. Free that GPU of other programs, "
    assert f"{SHARDS[1]}: FAILED, a rerun tries it again: {sentence}" in text
    assert "Traceback" not in text


def test_a_failed_shard_gives_3_and_a_rerun_finishes_it(whole, tmp_path):
    # A folder under the tar's name: the rename of this shard alone fails.
    out = without(whole, tmp_path / "out", SHARDS[1], SHARDS[6])
    blocker = out / "shards" / f"{SHARDS[1]}.tar" / "x"
    blocker.mkdir(parents=True)
    code, text = make(out)
    assert code is ExitCode.SHARDS_FAILED
    assert f"{SHARDS[1]}: FAILED" in text
    assert manifests(out) == [SHARDS[0], *SHARDS[2:]]
    assert not list(out.rglob(".tmp-*"))
    blocker.rmdir()
    blocker.parent.rmdir()
    assert make(out)[0] is ExitCode.OK
    assert contents(out) == contents(whole)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.long)])
def test_the_labelled_photos_end_as_labelled(data, labels, photo_server, tmp_path, executor):
    part = tmp_path / "photos.parquet"
    pq.write_table(pa.table({"URL": [f"{photo_server}/{row['file']}" for row in labels]}), part)
    sets = {
        "models.pack": data / "models" / "real",
        "models.accept_noncommercial": "true",
        "models.segmenter": "grabcut",
        "models.image_embedder": "patches",
        "download.allow_loopback": "true",
        "source.rows_per_shard": 10,
    }
    out = tmp_path / "out"
    pairs = [f"{name}={value}" for name, value in sets.items()]
    assert make(out, *pairs, shards=str(part), executor=executor)[0] is ExitCode.OK
    assert verify(out) == []
    ledger = pa.concat_tables([pq.read_table(path) for path in sorted((out / "shards").glob("*.parquet"))])
    verdicts = dict(zip(ledger.column("url").to_pylist(), ledger.column("verdict").to_pylist(), strict=True))
    reasons = {"": "kept", "noface": "no_face", "multi": "several_faces", "small_image": "small_image"}
    for row in labels:
        is_small = min(int(row["width"]), int(row["height"])) < 1024
        expected = "small_image" if is_small else reasons[row["reason"]]
        assert verdicts[f"{photo_server}/{row['file']}"] == expected, row["file"]
    assert (len(verdicts), list(verdicts.values()).count("kept")) == (28, 10)


def test_a_part_that_breaks_off_half_way_gives_3_and_stops_nothing_before_or_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata_files, "BATCH_ROWS", 1000)
    part = tmp_path / "part.jsonl"
    row = {"url": "http://127.0.0.1:9/a.jpg", "width": 10, "height": 10}
    lines = [json.dumps({**row, "url": f"{row['url']}?{n}"}) for n in range(2_500)]
    part.write_text("\n".join(lines) + '\n{"url": "http://127.0.0.1')
    (tmp_path / "whole.jsonl").write_text(f"{lines[0]}\n")
    shards = f"{part},{tmp_path}/whole.jsonl"
    code, text = make(tmp_path / "out", "source.rows_per_shard=10", shards=shards, profile="embedded")
    assert code is ExitCode.SHARDS_FAILED
    assert "part.jsonl" in text
    assert verify(tmp_path / "out") == []
    assert {"part-00000", "whole-00000"} < {*manifests(tmp_path / "out")}
