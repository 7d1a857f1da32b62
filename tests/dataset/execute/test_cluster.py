"""Ray on one node; and a cluster of two, both on this machine, of which one is lost and not replaced."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from sample_runs import SHARDS, begun, contents, without

from pipeline.dataset.config import Config, ExecutorSettings
from pipeline.dataset.execute import cluster_node
from pipeline.dataset.job import executor_of
from schemas.errors import PlanError
from stages.base import Runtime

DEMO = Path(__file__).resolve().parents[3] / "benchmarks" / "cluster_demo.py"

FAST = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
"""How soon the head sees that a node is dead."""


@pytest.fixture
def cluster() -> Iterator[object]:
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100_000_000, "_system_config": FAST}
    made = Cluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()


def first_worker(process: subprocess.Popen, title: str, nodes: Sequence[Any] = ()) -> psutil.Process:
    """The first process of these nodes, or of the run's own, whose title begins so."""
    parents = [psutil.Process(node.all_processes["raylet"][0].process.pid) for node in nodes]
    parents = parents or [psutil.Process(process.pid)]
    while True:
        for child in (child for parent in parents for child in parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                if " ".join(child.cmdline()).startswith(title):
                    return child
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def ends_whole(process: subprocess.Popen, whole: Path, out: Path, *, rows: int, made: int) -> None:
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, output + errors
    assert contents(out) == contents(whole)
    *_, now, end = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    assert (end["kind"], now["rows"], now["kept"], now["shards"]["made"]) == ("end", rows, 9, made)
    # what stages took in the processes of the models and of the fetching, and the hosts there
    assert min(now["stages"][name]["seconds"] for name in ("download", "detect", "embed_face", "pack")) > 0
    assert now["slowest_hosts"].keys() == {"sample.localhost"}


@pytest.mark.slow
def test_a_run_on_ray_makes_the_same_bytes_though_its_worker_is_killed(whole, tmp_path):
    out = without(whole, tmp_path / "out", *SHARDS[:5])
    words = ["--executor", "ray", "--set", "executor.workers=1", "--set", "executor.batch_rows=1"]
    process = begun(out, *words, "--set", f"watch.events={out}/events.jsonl")
    first_worker(process, "ray::_Maker").kill()
    ends_whole(process, whole, out, rows=17, made=5)


@pytest.mark.long
def test_two_workers_make_the_same_bytes_though_each_is_killed_and_the_node_of_one_is_gone(whole, tmp_path, cluster):
    node = cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    out = tmp_path / "out"
    words = ["--ray-address", cluster.address, "--set", "executor.workers=2", "--set", "executor.batch_rows=1"]
    words += ["--set", f"watch.events={out}/events.jsonl"]
    process = begun(out, *words)  # which inherits the token that the cluster has
    for title in ("ray::_Models", "ray::_Maker"):
        killed = first_worker(process, title, [cluster.head_node, node])
        killed.kill()
        killed.wait(60)  # or it would be found again
    first_worker(process, "ray::_Maker", [node])
    cluster.remove_node(node, allow_graceful=False)
    ends_whole(process, whole, out, rows=29, made=8)


def test_a_cluster_may_still_lack_nodes_but_not_for_the_first_worker_nor_reach_out_for_the_sample(monkeypatch, capsys):
    def required(address: str, nodes=("here",), sample_port=None, **have: float) -> str:
        monkeypatch.setattr("ray.cluster_resources", lambda: have)
        plan = SimpleNamespace(
            pool=SimpleNamespace(workers=3, cpus=2.0, gpus=1.0),
            runtime=Runtime(sample_port=sample_port),
            config=Config(executor=ExecutorSettings(ray_address=address)),
        )
        cluster_node.require_fit(plan, [{"NodeManagerAddress": node, "Alive": node != "gone"} for node in nodes])
        return capsys.readouterr().err

    enough = {"CPU": 16, "GPU": 3}
    assert required("head:6379", nodes=("here", "there"), **enough) == ""
    assert required("head:6379", nodes=("here", "here", "gone"), sample_port=1, **enough) == ""
    assert "room for 2 of 3 workers" in required("head:6379", CPU=16, GPU=2)
    assert "room for 1 of 3 workers" in required("head:6379", CPU=3, GPU=3)
    for address, have in {"head:6379": {"CPU": 16}, "": {"CPU": 16, "GPU": 2}}.items():
        with pytest.raises(PlanError, match="GPU, but Ray has"):
            required(address, **have)
    with pytest.raises(PlanError, match="served on this machine alone"):
        required("head:6379", nodes=("here", "there"), sample_port=1, **enough)


def test_all_runs_of_a_process_give_ray_the_token_that_it_remembers(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")
    tokens = {executor_of(Config()) and os.environ["RAY_AUTH_TOKEN"] for _ in range(2)}
    assert [len(token) for token in tokens] == [64]


@pytest.mark.long
@pytest.mark.parametrize("words", [[], ["--loopback"]], ids=["namespaces", "loopback"])
def test_nodes_with_addresses_of_their_own_die_and_join_and_no_byte_changes(words):
    done = subprocess.run([sys.executable, str(DEMO), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  ok   ") == 7  # three a run, and a node that joined
    assert "FAILED" not in done.stdout
