"""Images and cluster files, read: neither docker nor a cluster is at hand."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from test_setup import pins

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"


def dockerfile() -> dict[str, list[list[str]]]:
    """Stage -> its instructions, in words, with those of the stages it is made from before them."""
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stages: dict[str, list[list[str]]] = {}
    for line in filter(None, text.splitlines()):
        words = shlex.split(line)
        if words[0] == "FROM":
            _, base, _, stage = words
            stages[stage] = [*stages.get(base, [["FROM", base]])]
        else:
            stages[stage].append(words)
    return stages


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_is_pinned_not_run_by_root_and_gets_dependencies_and_code_in_layers_of_their_own(target):
    lines = dockerfile()[target]
    ((_, base), *_) = lines
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base)
    assert [words[1] for words in lines if words[0] == "USER"][-1] == "1000"
    assert lines.index(["USER", "1000"]) < lines.index(["ENTRYPOINT", "[faceshards]"])
    copies = [words[1:] for words in lines if words[0] == "COPY"]
    dependencies = ["--from=venv-" + target, "/opt/venv", "/opt/venv"]
    assert copies == [dependencies, ["--from=code", "/opt/faceshards", "/opt/faceshards"]]
    # Ray's launcher and KubeRay start `ray` in login shells
    assert any("/etc/profile.d/faceshards.sh" in words for words in lines)


def test_what_the_images_install_is_pinned_and_what_they_copy_is_let_into_the_context():
    stages = dockerfile()
    installs = [" ".join(words) for lines in stages.values() for words in lines if "install" in words]
    pip = [part for line in installs for part in line.split("&&") if "pip install" in part]
    own = [part for part in pip if part.endswith("--target /opt/faceshards .")]
    assert own
    assert [part for part in pip if "--constraint constraints.txt" not in part and part not in own] == []
    paths = {path for lines in stages.values() for word, *rest in lines if word == "COPY" for path in rest[:-1]}
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    own_paths = {path for path in paths if not path.startswith(("-", "/opt"))}
    assert own_paths == let_in
    assert all((ROOT / path).exists() for path in own_paths)


def test_volumes_of_the_cluster_belong_to_the_user_of_the_image():
    """A new volume takes the owner of the folder over which it lies; where there is none, it is root's."""
    nodes = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"].values()
    mounts = {volume.rpartition(":")[2] for node in nodes for volume in node["volumes"]}
    (owned,) = [words for words in dockerfile()["cpu"] if "--owner=faceshards" in words]
    assert mounts <= {*owned}


def test_the_gpu_image_is_of_cuda_13_and_cudnn_9():
    text = " ".join(" ".join(words) for words in dockerfile()["venv-gpu"])
    assert all(word in text for word in ("libcublas.so.13", "libcudnn.so.9", "--no-deps onnxruntime-gpu"))
    assert (DOCKER / "Dockerfile").read_text().count("/site-packages/nvidia/cudnn/lib") == 2  # the check, and the path


def test_the_launcher_file_is_what_ray_takes():
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    cluster = yaml.safe_load((DOCKER / "ray-cluster.yaml").read_text())
    workers = len(cluster["provider"]["worker_ips"])
    # numbers of a local provider, which Ray itself moves to where the schema has them
    assert (cluster.pop("min_workers"), cluster["max_workers"]) == (workers, workers)
    jsonschema.validate(cluster, schema)
    head, worker = cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]
    assert "--port=6379" in head
    assert "$RAY_HEAD_IP:6379" in worker
    assert "--env=RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert "--entrypoint=/usr/bin/env" in cluster["docker"]["run_options"]  # `env bash`, not `faceshards bash`


def _object(required: str, optional: str = "", **kinds: Any) -> dict[str, Any]:
    """A schema of an object that has these properties and no others, since Kubernetes prunes those it does not know."""
    properties = {name: kinds.get(name, True) for name in (required + " " + optional).split()}
    return {"type": "object", "required": required.split(), "properties": properties, "additionalProperties": False}


WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
CONTAINER = _object(
    "name image securityContext env readinessProbe livenessProbe resources volumeMounts",
    "ports",
    readinessProbe=_object("tcpSocket periodSeconds failureThreshold"),
    livenessProbe=_object("tcpSocket periodSeconds failureThreshold"),
    resources=_object("limits requests", limits=WORDS, requests=WORDS),
    env={"type": "array", "items": _object("name value", value={"type": "string"})},
)
POD = _object("containers securityContext volumes", containers={"type": "array", "items": CONTAINER, "maxItems": 1})
COUNT = {"type": "integer", "minimum": 0}
TEMPLATE = _object("spec", spec=POD)
HEAD = _object("template rayStartParams", rayStartParams=WORDS, template=TEMPLATE)
GROUP = _object(
    "groupName template minReplicas maxReplicas replicas rayStartParams",
    **{"minReplicas": COUNT, "maxReplicas": COUNT, "replicas": COUNT, "rayStartParams": WORDS, "template": TEMPLATE},
)
RAY_CLUSTER = _object(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion={"const": str(pins()["ray"])},
    authOptions=_object("mode", mode={"const": "token"}),
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": GROUP},
)
"""What of KubeRay's resource ray.io/v1 RayCluster is used, written from its reference."""


def test_the_kuberay_manifest_is_a_ray_cluster_of_nodes_that_are_alike_and_not_run_by_root():
    claim, cluster = yaml.safe_load_all((DOCKER / "kuberay.yaml").read_text())
    assert (claim["kind"], cluster["apiVersion"], cluster["kind"]) == (
        "PersistentVolumeClaim",
        "ray.io/v1",
        "RayCluster",
    )
    jsonschema.validate(cluster["spec"], RAY_CLUSTER)
    (group,) = cluster["spec"]["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    head, worker = cluster["spec"]["headGroupSpec"], group
    pods = [part["template"]["spec"] for part in (head, worker)]
    for pod in pods:
        (container,) = pod["containers"]
        assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, 1000)
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    (one,), (other,) = (pod["containers"] for pod in pods)
    assert all(one[key] == other[key] for key in ("image", "env", "volumeMounts"))
    # the probes ask what listens: the head's GCS, and a worker's raylet at the port that it is given
    assert one["livenessProbe"]["tcpSocket"]["port"] == one["ports"][0]["containerPort"] == 6379
    assert other["livenessProbe"]["tcpSocket"]["port"] == int(worker["rayStartParams"]["node-manager-port"])
    assert pods[0]["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_the_nodes_of_the_compose_file_are_one_image_with_one_token():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert {node["image"] for node in services.values()} == {"${FACESHARDS_IMAGE:-faceshards:cpu}"}
    assert all(node["environment"]["RAY_AUTH_MODE"] == "token" for node in services.values())
