"""Lists of what must not be used: how they are read, and that a URL is found however it is written."""

import csv
import gzip
import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.out.takedowns import Listed
from schemas.errors import SourceError

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


def holds(listed, url=None, sha256=None):
    (mask,) = listed.rows_in(pa.table({"url": pa.array([url], pa.string()), "sha256": pa.array([sha256], pa.string())}))
    return bool(mask)


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
    removed = Listed([listed(written)])
    assert holds(removed, URL)
    assert holds(removed, f" {URL} ")
    assert not holds(removed, OTHER)
    assert not holds(removed)


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
        removed = Listed([path])
        assert holds(removed, URL)
        assert holds(removed, "https://b.test/%C3%BC.jpg")
        assert holds(removed, sha256=SHA)
        assert not holds(removed, THIRD)
        assert not holds(removed, sha256=hashlib.sha256(b"y").hexdigest())


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("removed.tsv", ["url\twhy", f'"{URL}"\tby request; of 2026', f"{OTHER}\t{SHA}"]),
        ("removed.txt", [f"{URL}\tby request", f"{OTHER}\t", SHA]),
        ("removed.csv", ["url;why", f'{URL};"by request; of 2026"', f"{OTHER};{SHA}"]),
        ("removed.csv", [f"{URL},by request", OTHER, SHA]),
    ],
)
def test_whatever_separates_the_cells_of_a_list(listed, name, lines):
    """A whole line `URL, tab, reason` was taken for a URL, which no row has: nothing was removed, without a word."""
    removed = Listed([listed(*lines, name=name)])
    assert (holds(removed, URL), holds(removed, OTHER), holds(removed, sha256=SHA)) == (True, True, True)
    assert len(removed.hashes) == 3


def test_a_url_may_hold_what_separates_cells_elsewhere(listed):
    url = "http://a.test/x;jsessionid=1/y,z.jpg"
    assert holds(Listed([listed(url)]), url)
    assert holds(Listed([listed("url,why", f'"{url}",by request; of 2026', name="r.csv")]), url)
    assert holds(Listed([listed(url.replace(",", ""), name="r.csv")]), url.replace(",", ""))


def test_columns_of_few_values_are_read_too(tmp_path):
    columns = {"why": [SHA], "url": pa.array([URL]).dictionary_encode(), "n": pa.array([1]).dictionary_encode()}
    pq.write_table(pa.table(columns), tmp_path / "r.parquet")
    assert len(Listed([str(tmp_path / "r.parquet")]).hashes) == 2


def test_several_lists_add_up(listed):
    removed = Listed([listed(URL, name="1.txt"), listed(SHA, name="2.txt")])
    assert holds(removed, URL)
    assert holds(removed, sha256=SHA)


def test_a_long_list_is_small_and_quick(tmp_path):
    path = tmp_path / "many.parquet"
    pq.write_table(pa.table({"sha256": [f"{n:064x}" for n in range(50_000)]}), path)
    removed = Listed([str(path)])
    assert (removed.hashes.nbytes, removed.hashes.dtype) == (50_000 * 8, np.uint64)
    digests = [f"{n:064x}" for n in range(49_000, 51_000)]
    table = pa.table({"url": pa.nulls(2000, pa.string()), "sha256": digests})
    assert removed.rows_in(table).tolist() == [True] * 1000 + [False] * 1000


def test_the_digest_is_that_of_the_contents_alone(listed):
    one, two, same = listed(URL, name="1.txt"), listed(SHA, name="2.txt"), listed(f" {URL}#x", "# why", name="3.txt")
    assert Listed([one, two]).digest == Listed([two, same]).digest != Listed([two]).digest
    assert Listed().digest == ""
    assert not Listed()


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
    with pytest.raises(SourceError, match=rf"{name} (of download.removed holds neither|cannot be read)"):
        Listed([str(path)])


def test_an_absent_list_is_the_users_trouble(tmp_path):
    path = str(tmp_path / "absent.txt")
    with pytest.raises(SourceError, match=r"absent\.txt cannot be read"):
        Listed([path])
