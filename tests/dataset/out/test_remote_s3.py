"""OUT in a real S3-compatible server on loopback: whole runs, a driver that is killed, and a bucket that goes away.

Needs s3fs and moto's server (of the extra `dev`); skips, saying so, where they are not installed.
"""

import subprocess
from collections import Counter
from collections.abc import Iterator

import pyarrow.parquet as pq
import pytest
from sample_runs import DRAWN, SHARDS, begun, command, contents, make
from server import AWS_OF_NOBODY

from pipeline.dataset.finished.verify import verify
from pipeline.shared.files import RemotePath, locate, to_path
from schemas.errors import ExitCode, OutputError
from schemas.names import finished_shards

pytest.importorskip("s3fs", reason="s3fs is not installed: the extra `dev` has it")
server = pytest.importorskip("moto.server", reason="moto's server is not installed: the extra `dev` has it")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        **AWS_OF_NOBODY,
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


ON_RAY = ("--executor", "ray", "--set", "executor.workers=1")


@pytest.mark.long
@pytest.mark.parametrize("words", [(), ON_RAY], ids=["local", "ray"])
def test_a_driver_killed_in_the_middle_leaves_only_whole_shards_and_a_rerun_finishes(out, whole, words):
    process = begun(out, *words)
    process.kill()
    process.communicate()
    found, local = contents(out), contents(whole)
    done = finished_shards(found)
    assert done
    for name in done:
        for suffix in ("tar", "parquet", "json"):
            assert found[f"{name}.{suffix}"] == local[f"{name}.{suffix}"]
    assert make(out, report=True)[0] is ExitCode.OK
    assert contents(out) == local
    assert verify(out) == []
    assert (out / "report.html").exists()
    assert f"{len(SHARDS)} done before" in make(out)[1]


@pytest.mark.long
def test_a_run_on_ray_into_a_bucket_gives_the_bytes_of_a_local_one(out, whole):
    done = subprocess.run(command(out, *ON_RAY), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(out) == contents(whole)


def test_a_bucket_that_is_not_there_is_one_sentence(endpoint):
    with pytest.raises(OutputError, match="OUT s3://no-such-bucket/faces cannot be written: ") as refused:
        make(to_path("s3://no-such-bucket/faces"))
    assert "\n" not in str(refused.value)


def test_a_lack_of_credentials_is_one_sentence_and_not_a_lack_of_a_dataset(out, monkeypatch):
    (out / "dataset.json").write_bytes(b"{}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    type(locate(str(out))[0]).clear_instance_cache()
    try:
        for command in (verify, make):
            with pytest.raises(OutputError, match="Unable to locate credentials") as refused:
                command(out)
            assert "\n" not in str(refused.value)
    finally:
        type(locate(str(out))[0]).clear_instance_cache()


def test_a_folder_of_images_in_a_bucket_is_read_as_a_local_one(out, tmp_path):
    folder = tmp_path / "local" / "set"
    (folder / "sub").mkdir(parents=True)
    files = {"a.jpg": DRAWN["astronaut.jpg"](), "a.txt": b"a", "sub/b #1.jpg": DRAWN["admiral.jpg"](), "empty.jpg": b""}
    for name, content in {**files, "sub/b #1.txt": b"", "metadata.csv": b"file_name,text\nempty.jpg,e\n"}.items():
        (folder / name).write_bytes(content)
        (out.parent / f"set/{name}").write_bytes(content)
    for number, shards in enumerate((folder, out.parent / "set")):
        code, text = make(tmp_path / str(number), shards=str(shards), profile="embedded")
        assert code is ExitCode.OK, text
    assert contents(tmp_path / "1") == contents(tmp_path / "0")
    assert Counter(pq.read_table(tmp_path / "0/shards/set-00000.parquet")["verdict"].to_pylist()) == {
        "kept": 2,
        "empty_body": 1,
    }
