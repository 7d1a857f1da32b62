"""OUT in a real S3-compatible server on loopback: whole runs, a driver that is killed, and a bucket that goes away.

Needs s3fs and moto's server (of the extra `dev`); skips, saying so, where they are not installed.
"""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.dataset.config import load_config
from pipeline.dataset.finished.verify import verify
from pipeline.dataset.job import make_dataset, prepared
from pipeline.shared.files import RemotePath, to_path
from schemas.errors import ExitCode, OutputError
from schemas.names import finished_shards

pytest.importorskip("s3fs", reason="s3fs is not installed: the extra `dev` has it")
server = pytest.importorskip("moto.server", reason="moto's server is not installed: the extra `dev` has it")

SMALL_SHARDS = "source.rows_per_shard=6"


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


def make(out: Path | RemotePath, *words: str) -> str:
    """A run in this process; what it printed."""
    config = load_config(None, [SMALL_SHARDS, *words], shards="sample", executor="local")
    screen = io.StringIO()
    with prepared("sample", config) as job:
        assert make_dataset(job, out, Console(file=screen)) is ExitCode.OK, screen.getvalue()
    return screen.getvalue()


def command(out: RemotePath, *words: str) -> list[str]:
    """The same in a process of its own."""
    sets = ["--set", SMALL_SHARDS, *words]
    return [sys.executable, "-m", "pipeline", "dataset", "--shards", "sample", "--out", str(out), *sets]


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local")
    make(out)
    return contents(out)


def contents(out: Path | RemotePath) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "shards").iterdir())}


@pytest.mark.slow
def test_a_run_into_a_bucket_gives_the_bytes_of_a_local_one(out, local):
    words = ("--executor", "ray", "--set", "executor.workers=1")
    done = subprocess.run(command(out, *words), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(out) == local
    assert verify(out) == []
    assert (out / "report.html").exists()
    assert make(out).count("done before") == 4


def test_a_driver_killed_in_the_middle_leaves_only_whole_shards_and_a_rerun_finishes(out, local):
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((out / "shards").glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = contents(out)
    for name in finished_shards(found):
        for suffix in ("tar", "parquet", "json"):
            assert found[f"{name}.{suffix}"] == local[f"{name}.{suffix}"]
    make(out)
    assert contents(out) == local


def test_a_bucket_that_is_not_there_is_one_sentence(endpoint):
    with pytest.raises(OutputError, match="OUT s3://no-such-bucket/faces cannot be written: ") as refused:
        make(to_path("s3://no-such-bucket/faces"))
    assert "\n" not in str(refused.value)
