"""OUT in a real S3-compatible server on loopback: whole runs, a driver that is killed, and a bucket that goes away.

Needs s3fs and moto's server (of the extra `dev`); skips, saying so, where they are not installed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.dataset.finished.verify import verify
from pipeline.shared.files import RemotePath, to_path

pytest.importorskip("s3fs", reason="s3fs is not installed: the extra `dev` has it")
server = pytest.importorskip("moto.server", reason="moto's server is not installed: the extra `dev` has it")

SMALL_SHARDS = ["--set", "source.rows_per_shard=6"]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield settings["AWS_ENDPOINT_URL"]
    running.stop()


@pytest.fixture
def out(endpoint: str, request: pytest.FixtureRequest) -> RemotePath:
    import s3fs

    name = f"bucket-{abs(hash(request.node.name)) % 10**6}"
    s3fs.S3FileSystem().mkdir(f"s3://{name}")
    folder = to_path(f"s3://{name}/faces")
    assert isinstance(folder, RemotePath)
    return folder


def command(out: object, *words: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", "dataset", "--shards", "sample", "--out", str(out), *SMALL_SHARDS, *words]


def make(out: object, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *words), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local")
    assert make(out).returncode == 0
    return contents(out)


def contents(out: Path | RemotePath) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "shards").iterdir())}


@pytest.mark.slow
def test_a_run_into_a_bucket_gives_the_bytes_of_a_local_one(out, local):
    done = make(out, "--executor", "ray", "--set", "executor.workers=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(out) == local
    assert verify(out) == []
    assert (out / "report.html").exists()
    again = make(out)
    assert (again.returncode, again.stdout.count("done before")) == (0, 4), again.stderr
    told = subprocess.run([sys.executable, "-m", "pipeline", "verify", str(out)], capture_output=True, check=False)
    assert told.returncode == 0


def test_a_driver_killed_in_the_middle_leaves_only_whole_shards_and_a_rerun_finishes(out, local):
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not list((out / "shards").glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = contents(out)
    for name in [name for name in found if name.endswith(".json")]:
        assert {suffix: found[f"{name[:-5]}.{suffix}"] for suffix in ("tar", "parquet", "json")} == {
            suffix: local[f"{name[:-5]}.{suffix}"] for suffix in ("tar", "parquet", "json")
        }
    assert make(out).returncode == 0
    assert contents(out) == local


def test_a_bucket_that_is_not_there_is_one_sentence(endpoint):
    done = make("s3://no-such-bucket/faces")
    assert done.returncode == 2
    assert done.stderr.startswith("error: OUT s3://no-such-bucket/faces cannot be written: ")
    assert "Traceback" not in done.stderr
