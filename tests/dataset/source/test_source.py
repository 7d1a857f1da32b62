"""Sources: SHARDS words to parts, files in many schemas to seed rows, seed rows to shards, and every complaint."""

import csv
import gzip
import io
import json
import math
import os
import pickle
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

import aiohttp
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.dataset.execute.runner import judge_seeds
from pipeline.dataset.source import metadata_files
from pipeline.dataset.source.aliases import ALIASES, FILE_ALIASES
from pipeline.dataset.source.parts import Part, SourceSettings, find_parts
from pipeline.dataset.source.seeds import iter_shards, seed_tables
from pipeline.dataset.source.values import score, size
from schemas.columns import SEED, SEED_SCHEMA
from schemas.errors import SourceError
from schemas.names import sample_key
from stages.fetch.stored import Stored
from stages.metadata import Metadata
from stages.runtime import Runtime
from stages.settings import Settings

HERE = SourceSettings()
LAION = {
    "SAMPLE_ID": [7, 8, 9],
    "URL": ["http://a.org/1", " http://a.org/2 ", None],
    "TEXT": ["one", "two, with a comma", None],
    "HEIGHT": [1024, 90, 2000],
    "WIDTH": [2048, 5000, 2000],
    "NSFW": ["UNLIKELY", "UNSURE", "NSFW"],
    "similarity": [0.3, 0.4, 0.5],
}


@pytest.fixture(autouse=True)
def no_root(monkeypatch):
    monkeypatch.delenv("LAION_ROOT", raising=False)


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def parquet(path, columns=LAION, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def judge():
    return partial(judge_seeds, Metadata(Settings(), Runtime()))


def shards(part, rows_per_shard=1000):
    return list(iter_shards(part, SourceSettings(rows_per_shard=rows_per_shard), judge()))


def rows(spec, config=HERE):
    (part,) = find_parts(str(spec), config)
    return pa.concat_tables([seeds.table for seeds in shards(part)]).to_pylist()


def read_all(spec, config):
    return [shards(part) for part in find_parts(str(spec), config)]


def complaint(spec, **config):
    with pytest.raises(SourceError) as caught:
        read_all(spec, SourceSettings(**config))
    message = str(caught.value)
    assert "\n" not in message
    assert message[-1] in ".?"
    return message


def tar(path, samples, parquet_columns=None):
    """Write a webdataset tar: sample key -> suffix -> bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for key, files in samples.items():
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    if parquet_columns:
        parquet(path.with_suffix(".parquet"), parquet_columns)
    return str(path)


# words


def test_numbered_parts_are_the_files_under_the_root_in_name_order(tmp_path, monkeypatch):
    for name in ("b/part-1.parquet", "a/part-9.parquet", "c.jsonl.gz", ".hidden/x.parquet", "_tmp/y.parquet"):
        if name.endswith("parquet"):
            parquet(tmp_path / name)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"url": "http://c.org"}\n'))
    (tmp_path / "notes.txt").write_text("x")
    found = find_parts("laion-part-1..2,laion-part-0", SourceSettings(root=str(tmp_path)))
    assert found == [
        Part("laion-part-1", f"{tmp_path}/b/part-1.parquet", 3, "metadata"),
        Part("laion-part-2", f"{tmp_path}/c.jsonl.gz", None, "metadata"),
        Part("laion-part-0", f"{tmp_path}/a/part-9.parquet", 3, "metadata"),
    ]
    monkeypatch.setenv("LAION_ROOT", str(tmp_path))
    assert find_parts("laion-part-1..2,laion-part-0", HERE) == found
    monkeypatch.setenv("LAION_ROOT", "/nowhere")
    assert find_parts("laion-part-1..2,laion-part-0", SourceSettings(root=str(tmp_path))) == found


def test_a_part_is_named_after_its_file_and_travels_between_processes(tmp_path, monkeypatch):
    parquet(tmp_path / "sample.parquet")
    monkeypatch.chdir(tmp_path)
    (part,) = find_parts("sample.parquet", HERE)
    assert part == Part("sample", f"{tmp_path}/sample.parquet", 3, "metadata")
    assert pickle.loads(pickle.dumps(part)) == part
    assert [seeds.name for seeds in shards(part, 1)] == ["sample-00000", "sample-00001"]


def test_paths_globs_folders_and_lists(tmp_path):
    for name in ("d/x.parquet", "d/y.parquet", "d/sub/z.parquet", "odd[1].parquet"):
        parquet(tmp_path / name)
    names = lambda spec: [part.name for part in find_parts(spec, HERE)]  # noqa: E731
    assert names(f"{tmp_path}/d") == ["z", "x", "y"]
    assert names(f"{tmp_path}/d/*.parquet") == ["x", "y"]
    assert names(f"{tmp_path}/d/**/*.parquet") == ["z", "x", "y"]
    assert names(f"{tmp_path}/odd[1].parquet") == ["odd-1"]
    assert names(f" {tmp_path}/d/y.parquet , file://{tmp_path}/d/x.parquet") == ["y", "x"]


def test_memory_urls(memory):
    with memory.open("/m/part-0.parquet", "wb") as file:
        pq.write_table(pa.table(LAION), file)
    with memory.open("/m/part-1.csv", "wb") as file:
        file.write(b"url\nhttp://c.org\n")
    by_root = find_parts("laion-part-0..1", SourceSettings(root="memory://m"))
    assert [(part.path, part.rows) for part in by_root] == [
        ("memory:///m/part-0.parquet", 3),
        ("memory:///m/part-1.csv", None),
    ]
    assert find_parts("memory://m/*.parquet", HERE)[0].path == by_root[0].path
    assert [row["url"] for row in rows("memory://m/part-1.csv")] == ["http://c.org"]
    assert len(rows("memory://m/part-0.parquet")) == 3


# complaints


def test_numbered_parts_without_a_root():
    assert "set source.root or LAION_ROOT" in complaint("laion-part-3")


def test_a_part_beyond_the_last_names_the_root_and_what_is_there(tmp_path):
    for number in range(3):
        parquet(tmp_path / f"part-{number}.parquet")
    message = complaint("laion-part-1..7", root=str(tmp_path))
    assert message.startswith("laion-part-3 does not exist")
    assert all(
        word in message
        for word in (str(tmp_path), "3 metadata files, part-0.parquet to part-2.parquet", "laion-part-2")
    )


def test_a_root_without_metadata(tmp_path):
    assert "it does not exist" in complaint("laion-part-0", root=str(tmp_path / "gone"))
    assert "it is empty" in complaint("laion-part-0", root=str(tmp_path))
    for number in range(9):
        (tmp_path / f"{number}.jpg").touch()
    assert "found there: 0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg, 5.jpg and 3 more" in complaint(
        "laion-part-0", root=str(tmp_path)
    )


def test_unknown_words_suggest_near_ones(tmp_path):
    parquet(tmp_path / "part-00.parquet")
    assert "did you mean laion-part-12?" in complaint("laion-prt-12")
    assert "did you mean laion-part-0..99?" in complaint("laion-parts-0..99")
    assert "did you mean laion-part-0..3?" in complaint("laion-part-0-3")
    assert "did you mean sample?" in complaint("sampel")
    assert "part-00.parquet" in complaint(tmp_path / "part-00.parqet")
    assert "path, glob or URL" in complaint("/no/such/folder/qqq")


def test_folders_and_globs_with_nothing_to_read(tmp_path):
    (tmp_path / "photo.xcf").touch()
    assert "found there: photo.xcf" in complaint(tmp_path)
    (tmp_path / "photo.jpg").touch()
    assert "matches no file" in complaint(tmp_path / "*.parquet")
    assert "only files such as" in complaint(tmp_path / "*.jpg")
    assert "is no metadata file" in complaint(tmp_path / "photo.jpg")
    (tmp_path / "urls.txt").touch()
    assert "make a .csv whose first line is `url`" in complaint(tmp_path / "urls.txt")


def test_protocols_that_are_unknown_or_not_installed():
    fsspec.register_implementation(
        "moonfs", "no_such_package.Fs", errtxt="Install moonfs to access the moon", clobber=True
    )
    assert "Install moonfs to access the moon" in complaint("moonfs://bucket/x.parquet")
    assert "did you mean" in complaint("ss3://bucket/x.parquet")


def test_a_remote_file_system_that_cannot_be_reached():
    class Cut(MemoryFileSystem):
        protocol = "cut"

        def info(self, path, **options):
            raise aiohttp.ClientConnectionError("no route")

    fsspec.register_implementation("cut", Cut, clobber=True)
    assert complaint("cut://bucket/x.parquet") == "cut://bucket/x.parquet cannot be read: no route."


def test_servers_that_do_not_answer_are_not_called_missing():
    assert "Cannot connect to host 127.0.0.1:9" in complaint("http://127.0.0.1:9/x.parquet")
    assert "Cannot connect to host 127.0.0.1:9" in complaint("http://127.0.0.1:9/*.parquet")
    assert complaint("https://")


def test_a_chained_url_keeps_its_chain(memory, tmp_path):
    memory.pipe("/m/p.parquet", Path(parquet(tmp_path / "p.parquet")).read_bytes())
    (part,) = find_parts("simplecache::memory://m/p.parquet", HERE)
    assert (part.path, len(rows(part.path))) == ("simplecache::memory://m/p.parquet", 3)


def test_two_parts_may_not_share_a_name_or_a_file(tmp_path):
    first, second = parquet(tmp_path / "a/x.parquet"), parquet(tmp_path / "b/x.parquet")
    assert first in complaint(tmp_path)
    assert second in complaint(tmp_path)
    assert "twice" in complaint(f"{first},{first}")
    assert "twice" in complaint(f"{first},laion-part-0", root=str(tmp_path))


@pytest.mark.parametrize("name", ["x.parquet", "x.csv", "x.tsv.gz", "x.jsonl", "x.tar"])
def test_empty_and_unreadable_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"")
    assert str(path) in complaint(path)
    path.write_bytes(b"\xff\x1f\x8bnonsense" * 999)
    assert str(path) in complaint(path)


def test_a_file_without_rights(tmp_path):
    path = Path(parquet(tmp_path / "x.parquet"))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "Permission denied" in complaint(path)


@pytest.mark.parametrize("keep", [0.5, 0.95])
def test_a_truncated_parquet(tmp_path, keep):
    path = Path(parquet(tmp_path / "x.parquet"))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert f"{path} cannot be read" in complaint(path)


def test_a_parquet_with_a_damaged_page(tmp_path):
    path = Path(
        parquet(tmp_path / "x.parquet", {"url": [f"http://a.org/{n}" for n in range(5000)]}, use_dictionary=False)
    )
    data = bytearray(path.read_bytes())
    data[200:9000] = bytes(8800)
    path.write_bytes(data)
    assert f"{path} cannot be read" in complaint(path)


def test_a_truncated_gzip(tmp_path, monkeypatch):
    """Whose file is not waited for: the frames of what failed held it too."""
    monkeypatch.setattr(metadata_files, "_GIVEN_BACK_S", 30)
    path, begun = tmp_path / "x.csv.gz", time.monotonic()
    path.write_bytes(gzip.compress(b"url\n" + b"".join(b"http://a.org/%d\n" % (n * n) for n in range(99_999)))[:-9000])
    assert f"{path} cannot be read" in complaint(path)
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("content", [b"url,text", b"url,text\n", b"\xef\xbb\xbfurl,text\r\n"])
def test_a_csv_of_a_header_alone_has_no_rows(tmp_path, content):
    (tmp_path / "x.csv").write_bytes(content)
    assert rows(tmp_path / "x.csv") == []


@pytest.mark.parametrize("key", [["a"], {"x": 1}, b"\xff"])
def test_a_column_of_keys_beside_a_tar_that_are_no_names(tmp_path, key):
    path = tar(tmp_path / "0.tar", {"a": {"jpg": b"x"}}, {"key": [key], "caption": ["x"]})
    assert complaint(path).startswith(f"{tmp_path}/0.parquet cannot be read: ")


def test_a_ragged_csv(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("url,text\nhttp://a.org,one\nhttp://b.org\n")
    assert "Expected 2 columns, got 1" in complaint(path)


def test_jsonl_with_a_line_that_is_no_object(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('[1]\n{"url": "http://a.org"}\n{"url": "http://b\n')
    assert [row["verdict"] for row in rows(path)] == ["bad_metadata", None, "bad_metadata"]
    path.write_text('{"url": "http://a.org"}\n' * 150 + '{"url": "http://b')
    cut_off = f"{path} is cut off, or holds no JSON object a line: its last line is no whole one."
    assert complaint(path) == cut_off
    path.write_text('[{"url": "http://a.org"}]')
    assert complaint(path) == cut_off
    path.write_text('[\n  {"url": "http://a.org"},\n]\n'.replace("  {", "{"))
    assert complaint(path) == f"{path} holds no JSON objects, one a line."


def test_a_missing_url_column_lists_columns_and_aliases(tmp_path):
    message = complaint(parquet(tmp_path / "x.parquet", {"link": ["x"], "TEXT": ["y"]}))
    assert "it has link, TEXT" in message
    assert "image_url" in message
    (tmp_path / "x.csv").write_text("link\nx\n")
    (tmp_path / "x.jsonl").write_text('{"link": "x"}\n')
    assert "it has link;" in complaint(tmp_path / "x.csv")
    assert "it has link;" in complaint(tmp_path / "x.jsonl")


def test_a_column_that_cannot_be_what_it_says(tmp_path):
    path = parquet(tmp_path / "x.parquet", {"url": ["http://a.org"], "width": [[1, 2]]})
    assert "has list<" in complaint(path)
    assert "meta_width" in complaint(path)


# columns and values

SETS = {
    "laion-400m": (LAION, {"meta_width": 2048, "meta_height": 1024, "nsfw": "UNLIKELY", "text": "one"}),
    "laion-high-resolution": (
        {
            "URL": ["u"],
            "TEXT": ["t"],
            "WIDTH": [5.0],
            "HEIGHT": [6.0],
            "pwatermark": [0.25],
            "punsafe": [0.5],
            "hash": [1],
        },
        {"meta_width": 5, "meta_height": 6, "pwatermark": 0.25, "punsafe": 0.5, "text": "t"},
    ),
    "datacomp": (
        {"uid": ["a"], "url": ["u"], "text": ["t"], "original_width": [7], "original_height": [8], "sha256": ["0"]},
        {"url": "u", "meta_width": 7, "meta_height": 8},
    ),
    "coyo": (
        {
            "id": [1],
            "url": ["u"],
            "width": [7],
            "height": [8],
            "watermark_score": [0.75],
            "nsfw_score_opennsfw2": [0.125],
        },
        {"pwatermark": 0.75, "punsafe": 0.125},
    ),
    "pd12m": ({"id": [1], "url": ["u"], "caption": ["c"], "width": [7], "height": [8]}, {"text": "c", "meta_width": 7}),
    "img2dataset": (
        {"url": ["u"], "caption": ["c"], "width": [512], "original_width": [2000]},
        {"meta_width": 2000},
    ),
    "null columns": ({"url": ["u"], "width": pa.nulls(1), "nsfw": pa.nulls(1)}, {"meta_width": None, "nsfw": None}),
    "dictionaries": (
        {"url": pa.array(["u"]).dictionary_encode(), "width": pa.array(["9"]).dictionary_encode()},
        {"meta_width": 9},
    ),
    "binary and large": (
        {"url": pa.array([b"u"]), "text": pa.array([b"a\xff"]), "nsfw": pa.array(["NSFW"], pa.large_string())},
        {"url": "u", "text": "a\ufffd", "nsfw": "NSFW"},
    ),
    "odd names": ({" Image-URL ": ["u"], "Alt Text": ["t"], "URL_HASH": ["x"]}, {"url": "u", "text": "t"}),
    "no caption": ({"url": ["u"], "caption": pa.array([None], pa.string())}, {"text": None, "caption_chars": 0}),
    "blank caption": ({"url": ["u"], "caption": [" \n"]}, {"caption_chars": 0}),
    "no column of captions": ({"url": ["u"]}, {"caption_chars": 0}),
    "odd caption": ({"url": ["u"], "caption": [" \U0001f600 é\t"]}, {"caption_chars": 3}),
    "nsfw as yes or no": ({"url": ["u"], "nsfw": [True]}, {"punsafe": 1.0}),
    "nsfw as a probability": ({"url": ["u"], "nsfw": [0.75]}, {"punsafe": 0.75}),
}


@pytest.mark.parametrize("name", SETS)
def test_schemas_of_known_sets(tmp_path, name):
    columns, expected = SETS[name]
    (first, *_) = rows(parquet(tmp_path / "p.parquet", columns))
    assert {column: first[column] for column in expected} == expected
    assert first["key"] == "p-000000000"


def test_a_column_that_stands_twice_is_read_once(tmp_path):
    pq.write_table(
        pa.Table.from_arrays([pa.array(["u"]), pa.array(["v"])], names=["url", "url"]), tmp_path / "p.parquet"
    )
    assert [row["url"] for row in rows(tmp_path / "p.parquet")] == ["u"]


def test_csv_tsv_and_jsonl_give_the_rows_of_parquet(tmp_path):
    expected = rows(parquet(tmp_path / "p.parquet"))
    table = [dict(zip(LAION, values, strict=True)) for values in zip(*LAION.values(), strict=True)]
    lines = "\n\n".join(json.dumps(row) for row in table)
    (tmp_path / "p.jsonl").write_text("\ufeff" + lines)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name, mark in (("p.csv", ","), ("p.tsv", "\t")):
        cells = [[f'"{"" if value is None else value}"' for value in row.values()] for row in table]
        written = "\n".join(mark.join(row) for row in [list(LAION), *cells])
        (tmp_path / name).write_text("\ufeff" + written)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(written.encode()))
    for name in ("p.csv", "p.csv.gz", "p.tsv", "p.tsv.gz", "p.jsonl", "p.jsonl.gz"):
        found = rows(tmp_path / name)
        for row in found:
            # Their key tells the file; empty cells of a CSV are empty texts.
            row.update(
                key=row["key"].replace(row["part"], "p"), part="p", url=row["url"] or None, text=row["text"] or None
            )
        assert found == expected, name


def test_csv_with_lines_in_captions_and_late_surprises(tmp_path):
    body = 'http://a.org,"a\nb ""c""",1024\n' * 3 + "http://b.org,x,not a number\n"
    (tmp_path / "p.csv").write_bytes(b"url,text,width\n" + body.encode() + b"http://c.org,caf\xe9,\n")
    found = rows(tmp_path / "p.csv")
    assert [row["text"] for row in found] == ['a\nb "c"'] * 3 + ["x", "caf\ufffd"]
    assert [row["meta_width"] for row in found] == [1024] * 3 + [None, None]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_csv_may_be_separated_otherwise(tmp_path, separator):
    """As programs write it where the comma is for decimals; it was one column of a long name, and refused."""
    lines = [["url", "text", "width"], ["http://a.org/1", '"a; ""b"", c"', "9"], ["http://a.org/2", "d, e", "8"]]
    (tmp_path / "p.csv").write_text("".join(f"{separator.join(line)}\n" for line in lines))
    (part,) = find_parts(str(tmp_path / "p.csv"), SourceSettings())
    (table,) = seed_tables(part)
    assert table.select(["text", "meta_width"]).to_pylist() == [
        {"text": 'a; "b", c', "meta_width": 9},
        {"text": "d, e", "meta_width": 8},
    ]


@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.jsonl"])
def test_a_table_in_utf_16_is_refused_as_such(tmp_path, name):
    content = '{"url": "http://a.org"}\n' if name == "p.jsonl" else "url\nhttp://a.org\n"
    (tmp_path / name).write_bytes(content.encode("utf-16"))
    with pytest.raises(SourceError, match=rf"/{name} is UTF-16: save it as UTF-8\.$"):
        find_parts(str(tmp_path / name), SourceSettings())


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("header", "row", "cell"),
    [
        ("url,caption", "http://a.org/{},{}", "caf\xe9{}and \r on"),
        ("url,caption,note", "http://a.org/{},x,{}", "open{}" + 200_000 * "x"),
        ("file_name,caption", "photos/{}.JPG,{}", "open{}and on, and on"),
    ],
)
def test_a_mark_that_is_not_closed_takes_no_rows_of_a_csv(tmp_path, header, row, cell, end):
    """Eight rows were part of the cell of the one before them, without a word."""
    path, aliases = tmp_path / "p.csv", {**FILE_ALIASES, **ALIASES}
    lines = [header, *(row.format(n, "x") for n in range(10))]
    for mark in '"', "":
        lines[2] = row.format(1, f'"{cell.format(end)}{mark}')
        path.write_bytes(end.join(lines).encode("latin-1"))
        if mark:
            assert sum(table.num_rows for table in metadata_files.read_csv(str(path), aliases)) == 10
    with pytest.raises(SourceError, match=r"a quotation mark that is not closed, at '(caf|open)"):
        list(metadata_files.read_csv(str(path), aliases))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_marks_of_captions_enclose_nothing_in_a_tsv(tmp_path, end):
    """Rows 1 and 2 were part of the caption of row 0, without a word."""
    captions = ['"Unclosed', "plain", 'some "marks" inside', '"Star" by X', "", "last"]
    lines = ["url\tcaption\twidth", *(f"http://a.org/{n}\t{one}\t1024" for n, one in enumerate(captions))]
    (tmp_path / "p.tsv").write_bytes(end.join(lines).encode())
    found = rows(tmp_path / "p.tsv")
    assert [row["text"] for row in found] == captions
    assert [row["url"] for row in found] == [f"http://a.org/{n}" for n in range(6)]
    assert {row["meta_width"] for row in found} == {1024}


@given(st.lists(st.tuples(*[st.text('ab"\t\n\r é', max_size=6)] * 2), max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tsv_that_a_program_wrote_is_read_as_it_was_written(tmp_path, written):
    written = [("http://a.org", *cells) for cells in written]
    with (tmp_path / "p.tsv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([("url", "text", "caption"), *written])
    assert metadata_files._is_quoted(str(tmp_path / "p.tsv"))


def test_csv_captions_may_break_where_a_block_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata_files, "_CSV_BLOCK", 64)
    lines = [f'http://a.org/{n},"{"x" * (n % 23)}\ny",{n + 1024}' for n in range(60)]
    (tmp_path / "p.csv").write_text("\ufeffurl,text,width\n" + "\n".join(lines))
    assert [row["text"] for row in rows(tmp_path / "p.csv")] == ["x" * (n % 23) + "\ny" for n in range(60)]


class Slow(io.FileIO):
    """A file whose reader is in no hurry after the first time."""

    reads = 0

    def read(self, size=-1):
        self.reads += 1
        time.sleep(0.1 if self.reads > 1 else 0)
        return super().read(size)


def test_a_csv_that_is_left_early_is_in_no_thread_any_more(tmp_path, monkeypatch):
    (tmp_path / "p.csv").write_bytes(b"url\n" + b"http://a.org\n" * 500)
    monkeypatch.setattr(metadata_files, "_CSV_BLOCK", 128)
    file, tables = Slow(tmp_path / "p.csv"), metadata_files.read_csv(str(tmp_path / "p.csv"), metadata_files.ALIASES)
    to_open = [file, io.FileIO(tmp_path / "p.csv")]  # the last one for the header
    monkeypatch.setattr(metadata_files, "open_binary", lambda *_: to_open.pop())
    next(tables)
    tables.close()
    del tables
    assert sys.getrefcount(file) == 2, "this name, and the argument"


class Store(AbstractFileSystem):
    """Local files as those of a store, of which fsspec reads blocks; counts what is fetched, and what is given."""

    protocol, cachable = "counted", False
    fetched = given = 0
    block = 1 << 20

    class File(AbstractBufferedFile):
        def _fetch_range(self, start, end):
            Store.fetched += end - start
            return Path(self.path).read_bytes()[start:end]

        def read(self, length=-1):
            data = super().read(length)
            Store.given += len(data)
            return data

    def info(self, path, **_):
        return {"name": path, "size": Path(path).stat().st_size, "type": "file"}

    def _open(self, path, mode="rb", block_size=None, **options):
        return Store.File(self, path, mode, block_size or Store.block, **options)


@pytest.fixture
def store():
    fsspec.register_implementation("counted", Store, clobber=True)
    Store.fetched = Store.given = 0
    return Store


def test_lines_of_a_remote_jsonl_cost_no_block_each(tmp_path, store):
    """Of S3, 184 rows were read in 20 s: for each line 50 MB were copied."""
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f'{{"url": "http://a.org/{n}"}}\n' for n in range(5000)))
    (table,) = metadata_files.tables(f"counted://{path}")
    assert table["url"].to_pylist() == [f"http://a.org/{n}" for n in range(5000)]
    assert store.given <= 2 * path.stat().st_size


def test_a_remote_parquet_of_large_groups_is_fetched_once(tmp_path, store, monkeypatch):
    """Of S3, ten times its bytes came: 50 MB were read ahead in each column, and lost at the next."""
    monkeypatch.setattr(metadata_files, "_GROUP", 1 << 16)
    monkeypatch.setattr(metadata_files, "_BUFFER", 1 << 16)
    monkeypatch.setattr(metadata_files, "BATCH_ROWS", 1000)
    path, texts = tmp_path / "p.parquet", [os.urandom(40).hex() for _ in range(20_000)]
    pq.write_table(pa.table({"url": texts, "text": texts[::-1], "nsfw": texts}), path, data_page_size=1 << 14)
    tables = list(metadata_files.tables(f"counted://{path}"))
    assert pa.concat_tables(tables)["url"].to_pylist() == texts
    assert store.fetched <= 2 * path.stat().st_size


def test_a_remote_tar_is_fetched_once_for_its_rows_and_once_for_its_images(tmp_path, store, monkeypatch):
    """Of S3 came 105 MB to see that it is one, all of it twice for its rows, and 50 MB for each 32 images."""
    monkeypatch.setattr(Store, "block", 4 << 20)
    path, photos = tmp_path / "p.tar", [bytes(9) + os.urandom(100_000) for _ in range(64)]
    with tarfile.open(path, "w") as tar:
        for number, photo in enumerate(photos):
            for suffix, data in (("jpg", photo), ("json", b'{"caption": "%d"}' % number)):
                info = tarfile.TarInfo(f"{number:03}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    size = path.stat().st_size

    def fetched(work):
        before = store.fetched
        return work(), (store.fetched - before) / size

    (part,), at_first = fetched(lambda: find_parts(f"counted://{path}", HERE))
    (rows,), for_rows = fetched(lambda: list(part.tables()))
    assert rows["text"].to_pylist() == [[str(number)] for number in range(64)]
    images, refs = Stored(Settings()), rows["image_ref"].to_pylist()
    batches = [refs[start : start + 8] for start in range(0, 64, 8)]
    read, for_images = fetched(lambda: [one for batch in batches for one in images.read(batch)])
    assert read == photos
    some, for_some = fetched(lambda: images.read(refs[::16]))
    assert some == photos[::16]
    assert (at_first < 0.2, for_rows < 1.2, for_images < 1.2, for_some < 0.1) == (True,) * 4


def test_jsonl_rows_may_differ_in_keys_and_types(tmp_path):
    lines = (
        '{"url": "http://a.org", "width": 1024}', '{"URL": "http://b.org", "WIDTH": "2000.5", "text": ["no", "text"]}',
        '{"text": "\\ud800x", "nsfw": true, "width": null}', '{"url": "http://c.org", "width": NaN, "text": NaN}',
    )  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    found = rows(tmp_path / "p.jsonl")
    assert [row["url"] for row in found] == ["http://a.org", "http://b.org", None, "http://c.org"]
    assert [row["meta_width"] for row in found] == [1024, 2000, None, None]
    assert [row["text"] for row in found] == [None, "no", "?x", None]
    assert [row["text_alternatives"] for row in found] == [None, ["text"], None, None]
    assert [row["verdict"] for row in found] == [None, None, "bad_url", None]
    assert found[2]["punsafe"] == 1.0


def plain_size(value):
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return math.floor(number) if math.isfinite(number) and 1 <= math.floor(number) < 2**31 else None


NUMBERS = st.one_of(
    st.none(), st.integers(-5, 5000), st.integers(-(2**63), 2**63 - 1), st.sampled_from([2**31 - 1, 2**31])
)


@given(st.lists(NUMBERS), st.lists(st.one_of(st.none(), st.floats(), st.floats(0, 5000))))
def test_sizes_are_null_unless_positive_int32(integers, floats):
    assert size(pa.array(integers, pa.int64())).to_pylist() == [plain_size(value) for value in integers]
    assert size(pa.array(floats, pa.float64())).to_pylist() == [plain_size(value) for value in floats]
    strings = [None if value is None else f" {value} " for value in [*integers, *floats]]
    assert size(pa.array(strings, pa.string())).to_pylist() == [plain_size(value) for value in strings]


def test_values_of_other_types():
    assert size(pa.array([2**64 - 1, 7], pa.uint64())).to_pylist() == [None, 7]
    assert size(pa.array(["1,024", "1024px", "0x10", "1e3", "+12", ".5", "", "nan"])).to_pylist() == [
        None, None, None, 1000, 12, None, None, None,
    ]  # fmt: skip
    assert size(pa.array([1024], pa.decimal128(10, 2))).to_pylist() == [1024]
    assert score(pa.array([float("nan"), float("inf"), 0.5, None])).to_pylist() == [None, None, 0.5, None]


# shards


def plain_cut(alive, rows_per_shard):
    pieces, held = [], []
    for candidate in alive:
        held.append(candidate)
        if sum(held) == rows_per_shard or len(held) == 100 * rows_per_shard:
            pieces.append(held)
            held = []
    return [len(piece) for piece in [*pieces, *([held] if held else [])]] or [0]


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    runs=st.lists(st.tuples(st.booleans(), st.integers(1, 15)), max_size=6),
    rows_per_shard=st.sampled_from([1, 2, 3, 50]),
    group=st.integers(1, 120),
    batch=st.sampled_from([1, 7, 100, 1000]),
)
@example(runs=[(True, 2), (False, 130), (True, 90)], rows_per_shard=1, group=50, batch=7)  # a hundred without one kept
def test_shards_depend_on_the_rows_alone(tmp_path, runs, rows_per_shard, group, batch):
    alive = [kept for kept, length in runs for _ in range(length)]
    table = pa.table(
        {
            "url": pa.array([f"http://a.org/{n}" for n in range(len(alive))], pa.string()),
            "width": pa.array([2000 if kept else 10 for kept in alive], pa.int64()),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata_files, "BATCH_ROWS", batch)
        found = shards(Part("p", f"{tmp_path}/p.parquet", None, "metadata"), rows_per_shard)
    assert [seeds.table.num_rows for seeds in found] == plain_cut(alive, rows_per_shard)
    assert [seeds.name for seeds in found] == [f"p-{number:05d}" for number in range(len(found))]
    whole = pa.concat_tables([seeds.table for seeds in found])
    assert whole.column_names == [*SEED, "verdict", "stage"]
    assert whole.select(SEED).schema == SEED_SCHEMA
    assert whole["key"].to_pylist() == [sample_key("p", row) for row in range(len(alive))]
    assert whole["row"].to_pylist() == list(range(len(alive)))
    assert whole["url"].to_pylist() == table["url"].to_pylist()
    assert whole["verdict"].to_pylist() == [None if kept else "small_image" for kept in alive]
    assert whole["stage"].to_pylist() == [None if kept else "metadata" for kept in alive]
    assert sum(seeds.candidates for seeds in found) == sum(alive)


@pytest.mark.parametrize("name", ["p.parquet", "p.csv"])
def test_a_part_without_rows_gives_one_empty_shard(tmp_path, name):
    if name == "p.csv":
        (tmp_path / name).write_text("url,text\n")
    else:
        parquet(tmp_path / name, {"url": pa.array([], pa.string())})
    (part,) = find_parts(str(tmp_path / name), HERE)
    (only,) = shards(part)
    assert (only.name, only.candidates, only.table.num_rows) == ("p-00000", 0, 0)
    assert only.table.column_names == [*SEED, "verdict", "stage"]


def test_a_shard_carries_its_own_rows_only(tmp_path):
    urls = [f"http://a.org/{n:04d}" for n in range(20_000)]
    (part,) = find_parts(parquet(tmp_path / "p.parquet", {"url": urls}), HERE)
    first = next(iter_shards(part, SourceSettings(rows_per_shard=10), judge()))
    assert len(pickle.dumps(first)) < 10_000


def test_a_part_is_streamed(tmp_path):
    (part,) = find_parts(parquet(tmp_path / "p.parquet", {"url": [f"http://a.org/{n}" for n in range(50_000)]}), HERE)
    largest = 0

    def watched(table):
        nonlocal largest
        largest = max(largest, table.num_rows)
        return judge_seeds(stage, table)

    stage = Metadata(Settings(), Runtime())
    stream = iter_shards(part, HERE, watched)
    next(stream)
    assert largest == metadata_files.BATCH_ROWS
    assert sum(seeds.candidates for seeds in stream) == 49_000


# existing downloads

JPEG = b"\xff\xd8 not decoded here \xff\xd9"


def in_ref(ref):
    path, _, span = ref.rpartition("#")
    offset, length = map(int, span.split(":"))
    with fsspec.open(path) as file:
        file.seek(offset)
        return file.read(length)


def test_tars_of_img2dataset_with_their_parquets(tmp_path):
    meta = {
        "url": ["http://b.org", "http://a.org", "http://c.org"],
        "caption": ["b", "a", "c"],
        "key": ["000000002", "000000001", "000000003"],
        "status": ["success", "success", "failed_to_download"],
        "width": pa.array([1500, 2000, None], pa.int32()),
        "original_width": pa.array([9, 9, None], pa.int32()),
    }
    samples = {"000000002": {"jpg": JPEG + b"2", "json": b"{}"}, "000000001": {"txt": b"x", "webp": JPEG + b"1"}}
    tar(tmp_path / "00000.tar", samples, meta)
    tar(tmp_path / "00001.tar", samples, meta)
    (tmp_path / "00000_stats.json").write_text("{}")
    for spec in (tmp_path, tmp_path / "*.tar", f"{tmp_path}/00000.tar,{tmp_path}/00001.tar"):
        parts = find_parts(str(spec), HERE)
        assert [(part.name, part.kind, part.rows) for part in parts] == [("00000", "tar", 3), ("00001", "tar", 3)]
    found = pa.concat_tables([seeds.table for seeds in shards(parts[0])]).to_pylist()
    assert [(row["key"], row["url"], row["text"], row["meta_width"]) for row in found] == [
        ("00000-000000000", "http://a.org", "a", 2000),
        ("00000-000000001", "http://b.org", "b", 1500),
        ("00000-000000002", "http://c.org", "c", None),
    ]
    assert [row["verdict"] for row in found] == [None, None, None]
    assert [in_ref(row["image_ref"]) for row in found[:2]] == [JPEG + b"1", JPEG + b"2"]
    assert found[2]["image_ref"] == ""
    assert [part.kind for part in find_parts(f"{tmp_path}/*.parquet", HERE)] == ["metadata", "metadata"]


def test_a_folder_may_hold_metadata_and_tars(tmp_path):
    parquet(tmp_path / "laion.parquet")
    tar(tmp_path / "00000.tar", {"1": {"jpg": JPEG}}, {"key": ["1"]})
    assert [part.name for part in find_parts(str(tmp_path), HERE)] == ["00000", "laion"]
    (numbered,) = find_parts("laion-part-0", SourceSettings(root=str(tmp_path)))
    assert numbered.path.endswith("laion.parquet")


def test_a_tar_alone_has_its_metadata_inside(tmp_path):
    samples = {
        "b": {"json": json.dumps({"url": "http://b.org", "caption": "b", "width": 1100}).encode(), "PNG": JPEG},
        "a/1": {"jpg": JPEG, "txt": b"only text"},
        "a/0": {"json": b'{"url": "http://gone.org", "status": "failed_to_download"}'},
        "README": {"md": b"not a sample"},
    }  # fmt: skip
    path = tar(tmp_path / "t.tar", samples)
    found = rows(path)
    assert [(row["url"], row["text"], row["meta_width"]) for row in found] == [
        ("http://gone.org", None, None), (None, "only text", None), ("http://b.org", "b", 1100),
    ]  # fmt: skip
    assert found[0]["image_ref"] == ""
    assert in_ref(found[2]["image_ref"]) == JPEG
    assert [row["verdict"] for row in found] == [None, None, None]
    tar(tmp_path / "t.tar", samples, {"unrelated": [1]})
    assert rows(path) == found


def test_an_empty_tar_gives_one_empty_shard(tmp_path):
    assert rows(tar(tmp_path / "t.tar", {})) == []


def test_tars_of_one_name(tmp_path):
    tar(tmp_path / "a/00000.tar", {"1": {"jpg": JPEG}})
    tar(tmp_path / "b/00000.tar", {"1": {"jpg": JPEG}})
    assert "Two parts would be called '00000'" in complaint(tmp_path)


@pytest.mark.parametrize("cut", [100, 512, 700, 1024, 3000])
def test_truncated_tars(tmp_path, cut):
    path = Path(tar(tmp_path / "t.tar", {str(n): {"jpg": JPEG * 9} for n in range(9)}))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(SourceError, match=r"t\.tar"):
        find_parts(str(path), HERE)
    with pytest.raises(SourceError, match=r"t\.tar"):
        shards(Part("t", str(path), None, "tar"))


def test_a_tar_that_is_damaged_in_the_middle(tmp_path):
    path = Path(tar(tmp_path / "t.tar", {str(n): {"jpg": JPEG * 9} for n in range(9)}))
    data = bytearray(path.read_bytes())
    data[4096:4608] = b"x" * 512
    path.write_bytes(data)
    assert "truncated or damaged" in complaint(path)


def test_a_tar_with_the_parquet_of_another(tmp_path):
    path = tar(tmp_path / "t.tar", {"1": {"jpg": JPEG}}, {"key": ["7"], "url": ["http://a.org"]})
    assert "no key of it occurs there" in complaint(path)


def test_a_tar_with_broken_json(tmp_path):
    path = tar(tmp_path / "t.tar", {"1": {"jpg": JPEG, "json": b"[]"}, "2": {"jpg": JPEG, "json": b"{}"}})
    assert [row["verdict"] for row in rows(path)] == ["bad_metadata", None]


# real files


@pytest.fixture
def metadata_folder():
    folder = os.environ.get("FACESHARDS_DATA")
    if not folder:
        pytest.skip("FACESHARDS_DATA is not set")
    return Path(folder) / "metadata"


@pytest.mark.real_data
def test_the_real_list_of_img2dataset(metadata_folder):
    (part,) = find_parts(str(metadata_folder / "img2dataset_test_1000.parquet"), HERE)
    assert part.rows == 1000
    found = shards(part, 300)
    assert [seeds.candidates for seeds in found] == [300, 300, 300, 100]
    assert found[0].table["text"][1].as_py() == "Tavern Brawl by velinov"


@pytest.mark.real_data
def test_a_real_tar_of_img2dataset(metadata_folder):
    (part,) = find_parts(str(metadata_folder / "torchtitan_cc12m-train-0000.tar"), HERE)
    found = pa.concat_tables([seeds.table for seeds in shards(part)]).to_pylist()
    assert len(found) == 32
    assert all(in_ref(row["image_ref"])[:3] == b"\xff\xd8\xff" for row in found)
    assert all(row["url"].startswith("http") and row["text"] for row in found)
    assert {row["verdict"] for row in found} == {"small_image"}
