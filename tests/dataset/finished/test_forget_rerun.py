"""What was forgotten stays so: a later run into the same OUT asks nobody for it, and loses or doubles no other row."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from skimage import data
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset.finished.verify import verify
from pipeline.dataset.out.ledger import read_manifests
from stages.pixels.images import encode_jpeg

PHOTO = encode_jpeg(data.astronaut()[:200, :200], 90)
OTHER = encode_jpeg(data.astronaut()[300:, 300:], 90)
FILES = {f"/{name}.jpg": PHOTO + name.encode() for name in "abcdefg"} | {"/copy.jpg": OTHER}
MORE = {"/elsewhere.jpg": OTHER, "/last.jpg": PHOTO + b"last"}


@pytest.fixture
def server():
    """A loopback server that remembers what it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = (FILES | MORE).get(self.path, b"")
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def call(*words):
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    return done.stdout


def rows(out):
    tables = [pq.read_table(path) for path in sorted((out / "shards").glob("*.parquet"))]
    return pa.concat_tables(tables).to_pylist()


def test_a_rerun_asks_for_nothing_that_was_forgotten(server, tmp_path, pageless):
    base, asked = server
    part, more, out = tmp_path / "part.parquet", tmp_path / "two.parquet", tmp_path / "out"
    pq.write_table(pa.table({"URL": [f"{base}{path}" for path in FILES]}), part)
    pq.write_table(pa.table({"URL": [f"{base}/elsewhere.jpg", f"{base}/last.jpg"]}), more)
    words = ["--out", out, "--profile", "embedded", "--executor", "local", "--set", "download.allow_loopback=true"]
    words += ["--set", "source.rows_per_shard=3", "--set", "filter.min_image_px=64"]
    call("dataset", "--shards", part, *words)
    before = {row["key"]: row for row in rows(out)}
    copied = next(row["sha256"] for row in before.values() if row["url"].endswith("/copy.jpg"))
    said = call("forget", "--url", f"{base}/b.jpg", "--sha256", copied, out)
    assert "2 rows" in said
    assert verify(out) == []
    for manifest in ("part-00000.json", "part-00002.json"):  # as after a crash: shards that have to be made again
        (out / "shards" / manifest).unlink()
    asked.clear()
    call("dataset", "--shards", f"{part},{more}", *words)
    assert verify(out) == []
    # a file that was forgotten is withheld when it comes from an address that nobody knew
    assert sorted(path for path in asked if "robots" not in path) == [
        "/a.jpg", "/c.jpg", "/elsewhere.jpg", "/g.jpg", "/last.jpg",
    ]  # fmt: skip
    after = {row["key"]: row for row in rows(out)}
    gone = {key for key, row in after.items() if row["verdict"] == "forgotten"}
    assert gone == {"part-000000001", "part-000000007", "two-000000000"}
    assert set(after) == {*before, "two-000000000", "two-000000001"}
    assert all(after[key] == row for key, row in before.items() if key not in gone)
    assert sum(manifest.dropped["forgotten"] for manifest in read_manifests(out)) == 3


def test_lists_of_removals_reach_shards_that_are_done(server, tmp_path):
    base, asked = server
    part, out, removed = tmp_path / "part.parquet", tmp_path / "out", tmp_path / "removed.txt"
    pq.write_table(pa.table({"URL": [f"{base}{path}" for path in FILES]}), part)
    words = ["--out", out, "--shards", part, "--profile", "embedded", "--executor", "local"]
    words += ["--set", "download.allow_loopback=true", "--set", "source.rows_per_shard=3"]
    words += ["--set", "filter.min_image_px=64"]
    call("dataset", *words)
    before = {row["key"]: row for row in rows(out)}
    copied = next(row["sha256"] for row in before.values() if row["url"].endswith("/copy.jpg"))
    removed.write_text(f"{base.replace('http', 'https')}/./b.jpg\n{copied}\n")
    asked.clear()
    words += ["--set", f"download.removed=['{removed}']"]
    assert "2 rows, 0 of them samples, in 2 shards, are taken out" in call("dataset", *words)
    assert verify(out) == []
    assert not asked, "what is done is not fetched again"
    verdicts = {key: row["verdict"] for key, row in {row["key"]: row for row in rows(out)}.items()}
    assert {key for key, verdict in verdicts.items() if verdict == "removed"} == {"part-000000001", "part-000000007"}
    assert b"b.jpg" not in (out / "report.html").read_bytes()
    # A run that begins with the lists makes the same shards.
    fresh = tmp_path / "fresh"
    call("dataset", *words, "--out", fresh)
    for path in (out / "shards").iterdir():
        assert path.read_bytes() == (fresh / "shards" / path.name).read_bytes(), path.name
