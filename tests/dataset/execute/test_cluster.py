"""A Ray cluster of two nodes, both on this machine, of which one is lost and not replaced."""

import json
import os
from collections.abc import Iterator

import pytest
from sample_runs import begun, contents

FAST = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
"""How soon the head sees that a node is dead."""


@pytest.fixture
def cluster() -> Iterator[object]:
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100_000_000, "_system_config": FAST}
    made = Cluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()


@pytest.mark.slow
def test_two_workers_make_the_same_bytes_and_go_on_when_the_node_of_one_is_gone(whole, tmp_path, cluster):
    node = cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    out = tmp_path / "out"
    words = ["--ray-address", cluster.address, "--set", "executor.workers=2", "--set", "executor.batch_rows=1"]
    words += ["--set", f"watch.events={out}/events.jsonl"]
    process = begun(out, *words, shards=2, env={**os.environ, "RAY_AUTH_MODE": "disabled"})
    assert process.poll() is None, process.communicate()
    cluster.remove_node(node, allow_graceful=False)
    said, errors = process.communicate(timeout=400)
    assert process.returncode == 0, said + errors
    assert contents(out) == contents(whole)
    *_, now, end = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    assert (end["kind"], now["rows"], now["kept"], now["shards"]["made"]) == ("end", 29, 9, 8)
    # what stages took in the processes of the models and of the fetching, and the hosts there
    assert min(now["stages"][name]["seconds"] for name in ("download", "detect", "embed_face", "pack")) > 0
    assert now["slowest_hosts"].keys() == {"sample.localhost"}
