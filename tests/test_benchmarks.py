"""`make bench` in small, how its table is made and logged, and the simulator behind docs/scaling.md."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import report
import scaling
import torch
import train_made

from pipeline.shared.bases import find_base
from pipeline.train.base_model import Base

ROOT = Path(__file__).resolve().parent.parent
CASES = ("whole", "whole-10g", "stages", "executors", "sizes", "ledgers", "loader", "scaling", "group")


def bench(*words, data=""):
    environment = {**os.environ, "FACESHARDS_DATA": data}
    command = [sys.executable, str(ROOT / "benchmarks"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment, cwd=ROOT)


@pytest.mark.long
def test_all_cases_run_on_tiny_inputs(tmp_path):
    done = bench("--smoke", "--out", str(tmp_path / "bench.jsonl"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny models: numbers mean nothing" in done.stdout
    machine, *results = map(json.loads, (tmp_path / "bench.jsonl").read_text().splitlines())
    assert machine["smoke"]
    parts = " ".join(result["part"] for result in results)
    words = "whole dataset", "10 GFLOP", "detection to embedding", "Ray", "rows against", "report", "loader", "scaling"
    for word in words:
        assert word in parts
    assert all(f"| {result['part']} |" in done.stdout for result in results)


@pytest.fixture
def bench_here(monkeypatch, capsys, tmp_path):
    """The same in this process: exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("FACESHARDS_DATA", raising=False)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *words, "--out", str(tmp_path / "bench.jsonl")])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(ROOT / "benchmarks" / "__main__.py"), run_name="__main__")
        return int(done.value.code), *capsys.readouterr()

    return run


def test_what_needs_real_data_is_left_out_and_named(bench_here):
    code, out, err = bench_here("whole", "stages")
    assert (code, err) == (0, "")
    assert "FACESHARDS_DATA, the folder with labelled photos and weights: whole, stages" in out


def test_a_case_that_is_not_there_is_an_error_that_names_those_that_are(bench_here):
    code, _, err = bench_here("wholly")
    assert code == 2
    assert all(case in err for case in CASES)


@pytest.fixture
def results(tmp_path):
    """Two runs in one file."""
    path = tmp_path / "bench.jsonl"
    report.recorder(path, smoke=False)({"part": "older", "ratio": 9.0})
    record = report.recorder(path, smoke=False, device="a machine", torch="2.0")
    record({"part": "one", "images_per_s": 12345.678, "wanted": "0.6"})
    record({"part": "other", "images_per_s": 0.5, "wanted": None})
    return path


def test_the_table_is_that_of_the_last_run(results):
    lines = report.table(results).splitlines()
    assert lines[0].startswith("a machine, python 3.")
    assert lines[0].endswith(", torch 2.0")
    assert lines[2:] == [
        "| part | images per s | wanted |",
        "|---|---|---|",
        "| one | 1.235e+04 | 0.6 |",
        "| other | 0.5 |  |",
    ]


def test_results_of_several_kinds_have_a_line_each(results):
    record = report.recorder(results, smoke=True)
    record({"part": "one", "seconds": 1.5})
    record({"part": "other", "failed": "RuntimeError: no", "at_all": None})
    lines = report.table(results).splitlines()
    assert "numbers mean nothing" in lines[0]
    assert lines[4:] == ["| one | seconds 1.5 |", "| other | failed RuntimeError: no |"]


def test_a_log_entry_goes_before_the_newest(results, tmp_path, monkeypatch):
    log = tmp_path / "LOG.md"
    log.write_text("# Log\n\nNewest first.\n\n## 2026-11-25: before\n\nText.\n\n## 2026-11-24: older\n")
    monkeypatch.setattr(report, "LOG", log)
    report.log(results, "make bench")
    text = log.read_text()
    assert text.startswith("# Log\n\nNewest first.\n\n## 20")
    assert f": `make bench`\n\n{report.table(results)}\n\n## 2026-11-25: before\n\nText.\n" in text


def test_batches_of_one_resource_follow_each_other():
    stages = [scaling.Stage(2.0, ("workers",))]
    assert scaling.simulate(stages, {"workers": 1}, 10, ahead=3) == (20.0, {"workers": 1.0})
    assert scaling.simulate(stages, {"workers": 5}, 10, ahead=10) == (4.0, {"workers": 1.0})
    assert scaling.simulate(stages, {"workers": 5}, 10, ahead=2) == (10.0, {"workers": 0.4})


def test_the_slowest_stage_is_what_a_line_waits_for():
    stages = [scaling.Stage(1.0, ("a",)), scaling.Stage(3.0, ("b",)), scaling.Stage(1.0, ("c",))]
    seconds, busy = scaling.simulate(stages, dict.fromkeys("abc", 1), 100, ahead=8)
    assert seconds == 1 + 300 + 1
    assert max(busy, key=lambda name: busy[name]) == "b"


def test_stages_of_different_processes_share_the_cores():
    stages = [scaling.Stage(1.0, ("a", "cores")), scaling.Stage(1.0, ("b", "cores"))]
    capacity = {"a": 4, "b": 4}
    assert scaling.simulate(stages, {**capacity, "cores": 1}, 50, ahead=8)[0] == 100
    assert scaling.simulate(stages, {**capacity, "cores": 2}, 50, ahead=8)[0] == pytest.approx(50, abs=2)


@pytest.mark.long
def test_more_nodes_help_until_something_shared_is_busy():
    cpu = {"driver": 1.5e-4, "metadata": 5e-5, "shard": 4e-3, "ray": 1e-3, "models": 3e-2}
    rates = {nodes: scaling.cluster(cpu, nodes, gpus=0)[0] for nodes in (1, 10)}
    assert rates[10] == pytest.approx(10 * rates[1], rel=0.02)
    assert scaling.cluster(cpu, 1000, gpus=1)[0] == pytest.approx(1e4, rel=0.02)  # what the driver manages
    slow = {**cpu, "driver": 2.5e-4, "metadata": 2e-4}
    assert scaling.cluster(slow, 1000, gpus=1)[0] == pytest.approx(5e3, rel=0.02)  # what its thread of metadata does


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_base_of_a_published_layout_is_written_as_the_trainer_reads_it(kind, tmp_path, monkeypatch):
    narrow = {"block_out_channels": (32,) * (4 if kind == "sd15" else 3), "layers_per_block": 1}
    narrow |= {"attention_head_dim": 8} | ({"transformer_layers_per_block": 1} if kind == "sdxl" else {})
    monkeypatch.setitem(train_made.UNETS, kind, train_made.UNETS[kind] | narrow)
    monkeypatch.setitem(train_made.VAE, "block_out_channels", (32,) * 4)
    for part in train_made.TEXTS.values():
        monkeypatch.setitem(part, "num_hidden_layers", 1)
    train_made.write_base(tmp_path / kind, kind)
    base = Base(find_base(str(tmp_path / kind)), torch.device("cpu"), torch.float32)
    text = base.encode_text(["a face"])
    assert text.embeds.shape == (1, 77, 768 if kind == "sd15" else 2048)
    assert (text.pooled is None) == (kind == "sd15")
