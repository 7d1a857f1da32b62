"""What feeds a GPU, tried on a CPU: threads that share the models, batches across them, and a decoder for each."""

import json
import signal
import subprocess
import sys
import time
from operator import length_hint

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sample_runs import SHARDS, command, contents, make, manifests, without

from pipeline.dataset.config import load_config
from pipeline.dataset.execute import local
from pipeline.dataset.finished.verify import verify
from pipeline.dataset.plan import Plan, Pool, make_plan
from schemas.errors import ExitCode
from stages.detect import Detect
from stages.models import torch_backend
from stages.pixels import images

THREADS = 4


def in_threads(plan: Plan) -> Pool:
    """A worker as a GPU has it."""
    return Pool(plan.at("models"), 1, 1, 0, THREADS)


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.setattr(Plan, "pool", property(in_threads))
    yield
    images.set_decoding(1)


SCRIPT = f"""
import sys
from pipeline import __main__ as main
from pipeline.dataset.plan import Plan, Pool
Plan.pool = property(lambda plan: Pool(plan.at("models"), 1, 1, 0, {THREADS}))
main.main()
"""


def in_a_process(out, *words: str) -> list[str]:
    return [sys.executable, "-c", SCRIPT, *command(out, "--set", "executor.batch_rows=1", *words)[2:]]


@pytest.mark.parametrize("afresh", [False, pytest.param(True, marks=pytest.mark.long)])
def test_threads_that_share_the_models_change_no_byte(whole, tmp_path, threads, afresh):
    """Faces are looked for and cut out once by all tests, but `afresh`."""
    out = without(whole, tmp_path / "out", *SHARDS[:2])
    assert make(out, "executor.batch_rows=1", afresh=afresh)[0] is ExitCode.OK
    assert contents(out) == contents(whole)


@pytest.mark.long
def test_nor_do_they_on_ray(whole, tmp_path):
    words = in_a_process(tmp_path, "--executor", "ray", "--set", "executor.workers=1")
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tmp_path) == contents(whole)


def test_batches_come_back_in_order_and_few_are_begun_ahead(threads, monkeypatch):
    running, most, given = set(), [], iter(range(40))

    def apply(steps, number):
        running.add(number)
        most.append(len(running))
        time.sleep(0.02 if number % 3 else 0.1)
        running.discard(number)
        return number

    monkeypatch.setattr(local, "apply_all", apply)
    desk = local._Desk(make_plan(load_config(None, [], shards="sample")))
    done = []
    for number in desk.compute(given):
        done.append(number)
        assert 40 - length_hint(given) <= len(done) + THREADS
    assert done == list(range(40))
    assert max(most) == THREADS
    desk.close()


@pytest.mark.long
def test_an_interrupted_run_leaves_no_decoder(tmp_path):
    process = subprocess.Popen(in_a_process(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(manifests(tmp_path)) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130, printed + errors
    assert sum("decoding_child" in " ".join(child.cmdline()) for child in children if child.is_running()) == 0
    assert len(children) > 1


@pytest.mark.long
@pytest.mark.real_data
def test_batches_of_16_on_torch_keep_what_onnx_runtime_keeps(
    data, labels, photo_server, tmp_path, threads, monkeypatch
):
    """Screen, detector and recogniser, shared by threads, against one photo at a time."""
    part = tmp_path / "photos.parquet"
    large = [row["file"] for row in labels if min(int(row["width"]), int(row["height"])) >= 1024][:12]
    pq.write_table(pa.table({"URL": [f"{photo_server}/{file}" for file in large]}), part)
    sets = {
        "models.pack": data / "models" / "real",
        "models.accept_noncommercial": "true",
        "models.segmenter": "grabcut",
        "models.image_embedder": "patches",
        "models.det_size": 320,
        "source.rows_per_shard": 100,
        "models.screen": "detector",
        "download.allow_loopback": "true",
    }
    pairs = [f"{name}={value}" for name, value in sets.items()]
    on_torch = ["models.runtime.detector=torch", "models.runtime.face_embedder=torch", "executor.batch_rows=8"]
    computed = []

    class Sixteen(torch_backend.Batches):
        def __init__(self, compute, size, device, **options):
            super().__init__(lambda given: computed.append(len(given)) or compute(given), 16, device, **options)

    from stages.models.detectors import scrfd_torch
    from stages.models.face_embedders import arcface_torch

    with monkeypatch.context() as patch:
        for module in (scrfd_torch, arcface_torch):
            patch.setattr(module, "Batches", Sixteen)
        patch.setattr(Detect, "batch", 8)
        assert make(tmp_path / "torch", *pairs, *on_torch, shards=str(part))[0] is ExitCode.OK
    monkeypatch.undo()
    assert make(tmp_path / "onnx", *pairs, shards=str(part))[0] is ExitCode.OK
    assert set(computed) == {16}
    ours, theirs = (read(tmp_path / name) for name in ("torch", "onnx"))
    assert ours.keys() == theirs.keys()
    assert sum(row["verdict"] == "kept" for row in ours.values()) >= 4
    for key, row in ours.items():
        assert row["verdict"] == theirs[key]["verdict"], row["url"]
        for name, tolerance in {"bbox": 1.0, "det_score": 0.02, "screen_score": 0.05, "embedding_norm": 0.5}.items():
            assert (row[name] is None) == (theirs[key][name] is None), (row["url"], name)
            np.testing.assert_allclose(row[name] or 0, theirs[key][name] or 0, atol=tolerance, err_msg=row["url"])
    assert verify(tmp_path / "torch") == []
    manifest = json.loads(next((tmp_path / "torch" / "shards").glob("*.json")).read_bytes())
    assert [model.get("runtime") for model in manifest["models"][:1]] == ["torch"]


def read(out):
    (path,) = (out / "shards").glob("*.parquet")
    return {row["key"]: row for row in pq.read_table(path).to_pylist()}
