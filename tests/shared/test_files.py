"""Paths and fsspec URLs alike: names, sizes, whole files or none, and drafts that leave nothing."""

import os
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.shared.atomic import write_atomically
from pipeline.shared.commands import local_path
from pipeline.shared.files import AnyPath, Draft, names, rename, sizes, to_path, write
from schemas.errors import OutputError


@pytest.fixture(params=["local", "remote"])
def folder(request, tmp_path) -> AnyPath:
    return tmp_path if request.param == "local" else to_path(f"memory://files-{time.time_ns()}")


def test_what_a_path_or_url_stands_for(tmp_path):
    assert to_path("out") == Path("out")
    for one in (f"file://{tmp_path}", f"file:{tmp_path}"):
        assert (to_path(one), local_path(one)) == (tmp_path, tmp_path)
    url = to_path("memory://bucket/a.b/") / "c.tar"
    assert (str(url), url.name) == ("memory://bucket/a.b/c.tar", "c.tar")
    assert url.parent == to_path("memory://bucket/a.b")
    wrongs = {"s3:/bucket/x": "neither a folder nor a URL", "nonsense://x": "nonsense", "": "is empty"}
    for wrong, named in wrongs.items():
        with pytest.raises(OutputError, match=named):
            to_path(wrong)


def test_a_file_is_written_read_renamed_and_removed(folder):
    path = folder / "a.txt"
    assert not path.exists()
    path.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        path.unlink()
    with pytest.raises(FileNotFoundError):
        path.read_bytes()
    write(path, b"old")
    write(path, b"123")
    assert (path.exists(), path.is_file(), path.is_dir(), path.stat().st_size) == (True, True, False, 3)
    rename(path, folder / "b.txt")
    assert names(folder) == ["b.txt"]
    with (folder / "b.txt").open("rb") as stream:
        stream.seek(1)
        assert stream.read() == b"23"


def test_a_listing_has_folders_and_sizes_have_files_alone(folder):
    assert (names(folder / "absent"), sizes(folder / "absent")) == ([], {})
    below = folder / "below"
    if isinstance(below, Path):
        below.mkdir()
    for path, data in ((folder / "b", b"12"), (folder / ".a", b""), (below / "c", b"1")):
        write(path, data)
    assert names(folder) == [".a", "b", "below"]
    assert sizes(folder) == {".a": 0, "b": 2}
    assert sorted(path.name for path in folder.glob("b*")) == ["b", "below"]


def test_a_site_says_sizes_file_by_file(tmp_path):
    """Its pages list names alone."""
    (tmp_path / "a.tar").write_bytes(b"123")
    serving = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), serving) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert sizes(to_path(f"http://127.0.0.1:{server.server_port}")) == {"a.tar": 3}
        server.shutdown()


def test_a_draft_has_its_name_when_it_is_published_and_leaves_nothing_else(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    draft = Draft(folder / "x")
    draft.stream.write(b"content")
    draft.fsync()
    assert "x" not in names(folder)
    draft.publish()
    draft.close()
    assert (folder / "x").read_bytes() == b"content"
    Draft(folder / "y").close()
    assert names(folder) == ["x"]
    assert set(os.listdir(tmp_path)) <= {"x"}


_KILLED = """
import os, sys
from pathlib import Path
from pipeline.shared import atomic
real = os.fsync
def fsync(handle):
    real(handle)
    os.kill(os.getpid(), 9)
os.fsync = fsync
atomic.write_atomically(Path(sys.argv[1]), b"new" * 1000)
"""


def test_sigkill_during_an_atomic_write_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    done = subprocess.run([sys.executable, "-c", _KILLED, str(path)], check=False, env=os.environ)
    assert done.returncode == -9
    assert path.read_bytes() == b"old"
