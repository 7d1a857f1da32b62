"""Whole runs: equal bytes from every executor, resuming, interruption, and what a failed shard leaves."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.finished.verify import verify
from schemas.shard import Manifest

SMALL_SHARDS = ["--set", "source.rows_per_shard=6"]


def call(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *words], capture_output=True, text=True, check=False, **options
    )


def make(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return call("dataset", "--shards", "sample", "--out", str(out), *SMALL_SHARDS, *words)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "shards").iterdir())}


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """The sample in four shards, made in one process."""
    out = tmp_path_factory.mktemp("local")
    done = make(out)
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_says_what_came_of_it_and_its_output_verifies(local):
    assert len(contents(local)) == 12
    assert verify(local) == []
    page = (local / "report.html").read_text()
    assert page.count("a side of the image is shorter than filter.min_image_px") == 1  # two stages drop for it


def test_a_rerun_skips_what_is_done_and_changes_nothing(local):
    before = {path: path.stat().st_mtime_ns for path in (local / "shards").iterdir()}
    done = make(local)
    assert (done.returncode, done.stdout.count("done before")) == (0, 4)
    assert {path: path.stat().st_mtime_ns for path in (local / "shards").iterdir()} == before


@pytest.mark.slow
def test_ray_makes_the_same_bytes_with_two_workers(local, tmp_path):
    """With one: where an interrupted run goes on."""
    done = make(tmp_path, "--executor", "ray", "--set", "executor.workers=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tmp_path) == contents(local)


@pytest.mark.parametrize("kind", [["--set", "executor.batch_rows=1"], ["--set", "executor.fetch_ahead=1"]])
def test_how_rows_are_batched_does_not_change_a_byte(local, tmp_path, kind):
    assert make(tmp_path, *kind).returncode == 0
    assert contents(tmp_path) == contents(local)


@pytest.mark.slow
def test_the_img2dataset_engine_does_the_same_job(local, tmp_path):
    done = make(tmp_path, "--set", "download.engine=img2dataset")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(local)


def test_another_plan_is_refused_and_replan_goes_on(local, tmp_path):
    out = tmp_path / "out"
    assert make(out).returncode == 0
    refused = make(out, "--set", "filter.min_face_px=100")
    assert refused.returncode == 2
    assert "filter.min_face_px was 128.0, is now 100.0" in refused.stderr
    assert contents(out) == contents(local)
    assert make(out, "--set", "filter.min_face_px=100", "--replan").returncode == 0
    assert verify(out) == []
    assert contents(out) != contents(local)


def run_until_first_shard(out: Path, sign: signal.Signals, *words: str) -> int:
    """Start a run, send a signal when its first shard is done, and return its exit code."""
    command = [sys.executable, "-m", "pipeline", "dataset", "--shards", "sample", "--out", str(out), *SMALL_SHARDS]
    process = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list((out / "shards").glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sign)
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_exits_with_130_and_goes_on_later(local, tmp_path, sign):
    assert run_until_first_shard(tmp_path, sign) == 130
    assert not list(tmp_path.rglob(".tmp-*"))
    assert 0 < len(list((tmp_path / "shards").glob("*.json"))) < 4
    assert make(tmp_path).returncode == 0
    assert contents(tmp_path) == contents(local)


def test_a_killed_run_goes_on_later_with_no_stray_file(local, tmp_path):
    assert run_until_first_shard(tmp_path, signal.SIGKILL) == -9
    assert make(tmp_path).returncode == 0
    assert contents(tmp_path) == contents(local)
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.slow
def test_an_interrupted_ray_run_goes_on_later_without_ray(local, tmp_path):
    assert run_until_first_shard(tmp_path, signal.SIGINT, "--executor", "ray", "--set", "executor.workers=1") == 130
    assert make(tmp_path).returncode == 0
    assert contents(tmp_path) == contents(local)


def test_a_failed_shard_gives_3_and_a_rerun_finishes_it(local, tmp_path):
    # A folder under the tar's name: the rename of this shard alone fails.
    out = tmp_path / "out"
    blocker = out / "shards" / "sample-00001.tar" / "x"
    blocker.mkdir(parents=True)
    done = make(out)
    assert done.returncode == 3, done.stderr
    assert "sample-00001: FAILED" in done.stdout
    assert len(list((out / "shards").glob("*.json"))) == 3
    assert not list(out.rglob(".tmp-*"))
    blocker.rmdir()
    blocker.parent.rmdir()
    assert make(out).returncode == 0
    assert contents(out) == contents(local)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("executor", ["local", "ray"])
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
    words = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    out = tmp_path / "out"
    done = call("dataset", "--shards", str(part), "--out", str(out), "--executor", executor, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert verify(out) == []
    ledger = pa.concat_tables([pq.read_table(path) for path in sorted((out / "shards").glob("*.parquet"))])
    verdicts = dict(zip(ledger.column("url").to_pylist(), ledger.column("verdict").to_pylist(), strict=True))
    reasons = {"": "kept", "noface": "no_face", "multi": "several_faces", "small_image": "small_image"}
    for row in labels:
        is_small = min(int(row["width"]), int(row["height"])) < 1024
        expected = "small_image" if is_small else reasons[row["reason"]]
        assert verdicts[f"{photo_server}/{row['file']}"] == expected, row["file"]
    manifests = [Manifest.from_json(path.read_bytes()) for path in (out / "shards").glob("*.json")]
    assert (sum(manifest.rows_in for manifest in manifests), sum(manifest.kept for manifest in manifests)) == (28, 10)


def test_a_part_that_breaks_off_half_way_gives_3_and_keeps_what_came_before(tmp_path):
    part = tmp_path / "part.jsonl"
    row = {"url": "http://127.0.0.1:9/a.jpg", "width": 10, "height": 10}
    lines = [json.dumps({**row, "url": f"{row['url']}?{n}"}) for n in range(60_000)]
    part.write_text("\n".join(lines) + '\n{"url": "http://127.0.0.1')
    out = tmp_path / "out"
    words = ["--shards", str(part), "--out", str(out), "--profile", "embedded", "--executor", "local"]
    done = call("dataset", *words, "--set", "source.rows_per_shard=100")
    assert done.returncode == 3, done.stderr
    assert "part.jsonl" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert verify(out) == []
    assert len(list((out / "shards").glob("*.json"))) >= 1
