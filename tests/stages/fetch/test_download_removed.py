import csv
import gzip
import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers

from schemas.drops import DropReason
from schemas.errors import SourceError
from stages.base import DROP
from stages.download import Download
from stages.fetch.manners.removed import Removed
from stages.settings import DownloadSettings, Settings

URL, OTHER, THIRD = "http://a.test/x%2F.jpg?a=1", "https://b.test/ü.jpg", "http://c.test/"
SHA = hashlib.sha256(b"x").hexdigest()


@pytest.fixture
def listed(tmp_path):
    """A function that writes lines to a file, and gives its path."""

    def write(*lines, name="removed.txt"):
        path = tmp_path / name
        path.write_bytes("\n".join(lines).encode())
        return str(path)

    return write


@pytest.fixture
def server():
    made = servers.HostileServer()
    yield made
    made.close()


def run(urls, *lists, refs=None):
    told = DownloadSettings(allow_loopback=True, respect_robots=False, removed=lists)
    stage = Download(Settings(download=told))
    try:
        refs = pa.array(refs or [None] * len(urls), pa.string())
        return stage(pa.table({"url": pa.array(urls, pa.string()), "image_ref": refs})).to_pylist()
    finally:
        stage.close()


def test_drops_removed(server, listed):
    path = listed("# taken down", "", server.url("/ok.jpg"), hashlib.sha256(servers.LARGE).hexdigest().upper())
    rows = run([server.url("/ok.jpg"), server.url("/chunked.jpg"), server.url("/404.jpg")], path)
    assert [row[DROP] for row in rows] == [DropReason.REMOVED, DropReason.REMOVED, DropReason.NOT_FOUND]
    assert [row["image"] for row in rows] == [None] * 3
    assert rows[1]["sha256"] == hashlib.sha256(servers.LARGE).hexdigest()
    assert (server.hits["/ok.jpg"], server.hits["/chunked.jpg"]) == (0, 1), "a removed URL is not asked for"


def test_drops_removed_from_an_existing_download_too(listed, tmp_path):
    tar = tmp_path / "0.tar"
    tar.write_bytes(servers.LARGE)
    ref = f"{tar}#0:{len(servers.LARGE)}"
    path = listed(URL, hashlib.sha256(servers.LARGE).hexdigest())
    assert [row[DROP] for row in run([URL, THIRD], path, refs=[ref, ref])] == ["removed"] * 2


def test_nothing_is_removed_without_a_list(server):
    assert run([server.url("/ok.jpg")])[0][DROP] is None


@pytest.mark.parametrize(
    "written",
    [
        URL,
        f"  {URL}\r",
        URL.replace("http", "HTTP"),
        URL.replace("a.test", "A.TEST:80"),
        URL.replace("http", "https"),
        URL.replace("a.test", "me@a.test."),
        URL.replace("x%2F.jpg", "x%2f%2Ejpg"),
        URL.replace("x%2F", "b/../x%2F"),
        f"{URL}#fragment",
        f"\ufeff{URL}",
    ],
)
def test_a_url_is_the_same_however_it_is_written(listed, written):
    removed = Removed([listed(written)])
    assert removed.has_url(URL)
    assert removed.has_url(f" {URL} ")
    assert not removed.has_url(OTHER)
    assert not removed.has_url(None)


def test_text_csv_and_parquet_say_the_same(listed, tmp_path):
    table = tmp_path / "removed.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["url", "why"], [URL, "by request, of 2026"], [OTHER, SHA]])
    columns = tmp_path / "removed.parquet"
    pq.write_table(
        pa.table({"n": [1, 2], "URL": [URL, None], "more": pa.array([OTHER, SHA], pa.large_string())}), columns
    )
    packed = tmp_path / "removed.txt.gz"
    packed.write_bytes(gzip.compress(f"{URL}\n{OTHER}\n{SHA}".encode()))
    for path in (listed(URL, OTHER, SHA), str(table), str(columns), str(packed)):
        removed = Removed([path])
        assert removed.has_url(URL)
        assert removed.has_url("https://b.test/%C3%BC.jpg")
        assert removed.has_sha256(SHA)
        assert not removed.has_url(THIRD)
        assert not removed.has_sha256(hashlib.sha256(b"y").hexdigest())


def test_several_lists_add_up(listed):
    removed = Removed([listed(URL, name="1.txt"), listed(SHA, name="2.txt")])
    assert removed.has_url(URL)
    assert removed.has_sha256(SHA)


def test_a_list_of_a_million_is_small_and_quick(tmp_path):
    path = tmp_path / "many.parquet"
    pq.write_table(pa.table({"sha256": [f"{n:064x}" for n in range(200_000)]}), path)
    removed = Removed([str(path)])
    assert removed._hashes.nbytes == 200_000 * 8
    assert removed._hashes.dtype == np.uint64
    assert all(removed.has_sha256(f"{n:064x}") for n in range(0, 200_000, 999))
    assert not any(removed.has_sha256(f"{n:064x}") for n in range(200_000, 201_000))


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"", "r.txt"),
        (b"nothing of use\n", "r.txt"),
        (b"PAR1 no parquet", "r.parquet"),
        (b"\xff\xfe\0", "r.txt"),
        (b'"' + b"x" * 200_000, "r.csv"),
        (b"no gzip", "r.txt.gz"),
    ],
)
def test_a_list_without_sense_is_the_users_trouble(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SourceError, match=rf"{name} of download.removed"):
        Removed([str(path)])


def test_an_absent_list_is_the_users_trouble(tmp_path):
    path = str(tmp_path / "absent.txt")
    with pytest.raises(SourceError, match=r"absent\.txt of download\.removed cannot be read"):
        Removed([path])
