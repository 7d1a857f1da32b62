"""Images that are there already: the layouts of folders, tables and tools, and what becomes of names and captions."""

import csv
import errno
import io
import json
import os
import posixpath
import re
import shutil
import tarfile
import time
import unicodedata
import warnings
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import ClientPayloadError
from PIL import Image
from sample_runs import DRAWN, contents, make
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset.finished.verify import verify
from pipeline.dataset.source.parts import SourceSettings, find_parts
from pipeline.dataset.source.pictures import Pictures
from pipeline.dataset.source.seeds import seed_tables
from pipeline.shared.tars import unpack
from schemas.errors import ExitCode, OutputError, SourceError
from stages.base import DROP
from stages.download import Download
from stages.fetch import stored
from stages.runtime import Runtime
from stages.settings import FilterSettings, Settings

EMBEDDED = ("--profile", "embedded", "--executor", "local")


def encoded(value=0, format="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 90, 30)).save(buffer, format)
    return buffer.getvalue()


def put(folder, **files):
    """Write files by name; `__` stands for a slash."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def rows(spec, **source):
    """The rows of all parts, each with the image that its reference leads to."""
    download = Download(Settings(filter=FilterSettings(min_image_px=1)), Runtime())
    found = []
    for part in find_parts(str(spec), SourceSettings(**source)):
        for table in seed_tables(part):
            read = download(table.select(Download.reads)).to_pylist()
            found += [{**row, **one} for row, one in zip(table.to_pylist(), read, strict=True)]
    download.close()
    return found


def picked(found, *names):
    return [tuple(row[name] for name in names or ("source_file", "text", "text_alternatives")) for row in found]


def test_images_of_rarer_suffixes_are_rows_too(tmp_path):
    """Also those that are not decoded here: a drop is seen, what is passed over is not."""
    names = ["a.jfif", "b.JPE", "c.heic", "d.heif", "e.HIF", "f.jp2", "g.MPO", "h.apng"]
    put(tmp_path, **dict.fromkeys([*names, "x.CR2", "y.dng"], encoded(format="JPEG")))
    assert [name for (name,) in picked(rows(tmp_path), "source_file")] == names
    (part,) = find_parts(str(tmp_path), SourceSettings())
    notes = (f"{tmp_path}: left out, as files of cameras or drawings, which are not read: 2",)
    assert part.pictures.named.notes == notes


# A whole run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures of faces, with captions in each of the ways, and what is none."""
    folder = tmp_path_factory.mktemp("made images")
    put(
        folder,
        **{
            "a #1.jpg": DRAWN["astronaut.jpg"](),
            "a #1.txt": "an astronaut\n",
            "bad.jpg": encoded(),
            "bad.json": "[]",
            "sub/grüße\nx.jpg": DRAWN["admiral.jpg"](),
            "sub/grüße\nx.json": json.dumps({"prompt": "an admiral", "caption": ["one", "two"], "seed": 3}),
            "sub/warm.webp": DRAWN["warm.webp"](),
            "sub/warm.webp.caption": "warm",
        },
    )
    return folder


@pytest.fixture(scope="module")
def out(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert (
        make(out, "source.rows_per_shard=2", shards=f"made:{made}", profile="embedded", report=True)[0] is ExitCode.OK
    )
    return out


def samples(out):
    tars = sorted((out / "shards").glob("*.tar"))
    return {sample.key: json.loads(sample.files["json"]) for tar in tars for sample in unpack(tar)}


def test_a_folder_becomes_a_dataset_that_knows_its_files(made, out):
    assert verify(out) == []
    found = picked(samples(out).values(), "source_kind", "source_file", "text", "url")
    assert found == [
        ("made", "a #1.jpg", "an astronaut", None),
        ("made", "sub/grüße\nx.jpg", "one", None),
        ("made", "sub/warm.webp", "warm", None),
    ]
    assert [json.get("text_alternatives") for json in samples(out).values()] == [None, ["two", "an admiral"], None]
    ledger = pa.concat_tables(map(pq.read_table, sorted((out / "shards").glob("*.parquet")))).to_pylist()
    assert picked(ledger, "source_kind", "source_file", "verdict")[1] == ("made", "bad.jpg", "bad_metadata")
    page = (out / "report.html").read_text()
    assert all(words in page for words in ("3 made by a model", "<bdi>a #1.jpg</bdi>", "<bdi>bad.jpg</bdi>"))


def test_the_name_of_a_folder_is_cut_where_no_tar_holds_the_longest_name_of_its_files(tmp_path):
    folder = tmp_path / ("f" * 54)
    put(folder, **{"warm.webp": DRAWN["warm.webp"]()})
    sets = "pack.hidden=int8", "segment.condition=both"
    assert make(tmp_path / "out", *sets, shards=str(folder), profile="embedded", extras="mirror")[0] is ExitCode.OK
    (sample,) = samples(tmp_path / "out")
    assert re.fullmatch("f{44}-[0-9a-f]{8}-000000000", sample)
    done = CliRunner().invoke(app, ["forget", str(tmp_path / "out"), "--file", f"{folder.name}/warm.webp"])
    assert "Forgotten: 1 row, 1 of them samples" in done.output


def test_a_file_is_forgotten_by_its_folder_as_it_is_called_and_no_other_is(tmp_path):
    """A part's name is made of its folder's: `a b` gives `a-b`, and a long one is cut."""
    long = "f" * 90
    put(tmp_path / "all", **{f"{name}/x.webp": DRAWN["warm.webp"]() for name in ("a b", "a-b", long)})
    folders = ",".join(str(tmp_path / "all" / name) for name in ("a b", long))
    for out, shards in (("parts", folders), ("whole", str(tmp_path / "all"))):
        assert make(tmp_path / out, "filter.min_image_px=64", shards=shards, profile="embedded")[0] is ExitCode.OK
        for name in ("a b", long):
            done = CliRunner().invoke(app, ["forget", str(tmp_path / out), "--file", f"{name}/x.webp"])
            assert "Forgotten: 1 row, 1 of them samples" in done.output, (out, name)
    assert picked(samples(tmp_path / "whole").values(), "source_file") == [("a-b/x.webp",)]


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.long)])
def test_a_second_run_gives_the_same_bytes(made, out, tmp_path, executor):
    words = {"shards": f"made:{made}", "profile": "embedded", "executor": executor}
    assert make(tmp_path, "source.rows_per_shard=2", **words)[0] is ExitCode.OK
    assert contents(tmp_path) == contents(out)


def test_a_file_is_forgotten_by_its_name(made, out, tmp_path, remembered, pageless):
    words = ["dataset", "--shards", f"made:{made}", "--out", str(tmp_path), "--profile", "embedded"]
    words += ["--executor", "local", "--set", "source.rows_per_shard=2"]
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    files = ["--file", "a #1.jpg", "--file", f"{made.name.replace(' ', '-')}/sub/warm.webp"]
    before = contents(tmp_path)
    for wrong in (f"{made}/a #1.jpg", "no/such.jpg"):  # neither the path on this machine, nor that of a list
        refused = CliRunner().invoke(app, ["forget", str(tmp_path), *files, "--file", wrong])
        assert isinstance(refused.exception, OutputError)
        assert f"has the file {wrong!r}" in str(refused.exception)
    assert (contents(tmp_path), (tmp_path / "forgotten.json").exists()) == (before, False)
    done = CliRunner().invoke(app, ["forget", str(tmp_path), *files])
    assert "Forgotten: 2 rows, 2 of them samples, in 2 shards." in done.output
    assert CliRunner().invoke(app, ["forget", str(tmp_path), *files]).exit_code == 0  # as after an interruption
    assert picked(samples(tmp_path).values(), "source_file") == [("sub/grüße\nx.jpg",)]
    assert verify(tmp_path) == []
    assert b"warm" not in b"".join(contents(tmp_path).values())
    for path in (tmp_path / "shards").glob("*.json"):
        path.unlink()  # all is made anew, without what was forgotten
    assert CliRunner().invoke(app, words).exit_code == 0
    assert picked(samples(tmp_path).values(), "source_file") == [("sub/grüße\nx.jpg",)]
    described = json.loads((tmp_path / "dataset.json").read_text())
    del described["shards"]  # as before a run came to its end
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    done = CliRunner().invoke(app, ["forget", str(tmp_path), "--file", "to/come.jpg"])
    assert (done.exit_code, "later runs into it will not fetch it" in done.output) == (0, True)


def test_a_folder_that_changed_mixes_no_shards(made, out, tmp_path):
    folder = tmp_path / made.name
    put(folder, **{"a #1.jpg": DRAWN["astronaut.jpg"](), "b.jpg": encoded()})
    words = {"shards": f"made:{folder}", "profile": "embedded"}
    assert make(tmp_path / "out", "source.rows_per_shard=2", **words)[0] is ExitCode.OK
    before = contents(tmp_path / "out")
    code, text = make(tmp_path / "out", "source.rows_per_shard=2", **(words | {"shards": str(folder)}))
    assert (code, "was made of made, its part gives it web" in text) == (ExitCode.SHARDS_FAILED, True)
    (folder / "a #1.jpg").rename(folder / "a #2.jpg")
    plan = ["plan", "--shards", words["shards"], "--out", str(tmp_path / "out"), *EMBEDDED]
    planned = CliRunner().invoke(app, [*plan, "--set", "source.rows_per_shard=2"])
    assert "was made of a #1.jpg, its part gives it a #2.jpg" in str(planned.exception)
    code, text = make(tmp_path / "out", "source.rows_per_shard=2", **words)
    assert (code, "was made of a #1.jpg, its part gives it a #2.jpg" in text) == (ExitCode.SHARDS_FAILED, True)
    assert contents(tmp_path / "out") == before
    described = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert described["sources"] == [f"made:{made.name}"], "what was refused gave no rows"


def test_a_rerun_refuses_shards_of_images_that_are_gone(tmp_path):
    """Those of the last shard, to which no row of the folder leads any more: it stayed in OUT, and the run was fine."""
    folder, words = tmp_path / "set", {"shards": str(tmp_path / "set"), "profile": "embedded"}
    put(folder, **{f"{number}.png": encoded(number) for number in range(3)})
    for _ in range(2):
        assert make(tmp_path / "out", "source.rows_per_shard=1", **words)[0] is ExitCode.OK
    (folder / "2.png").unlink()
    plan = ["plan", "--shards", str(folder), "--out", str(tmp_path / "out"), *EMBEDDED]
    plan += ["--set", "source.rows_per_shard=1"]
    planned = CliRunner().invoke(app, plan)
    assert "set-00002 is finished, but its part gives it no rows any more" in str(planned.exception)
    assert CliRunner().invoke(app, [*plan, "--sample", "1"]).exit_code == 0
    code, text = make(tmp_path / "out", "source.rows_per_shard=1", **words)
    assert (code, "set-00002 is finished, but its part gives it no rows any more" in text) == (
        ExitCode.SHARDS_FAILED,
        True,
    )
    put(tmp_path / "more", **{"a.png": encoded()})
    words["shards"] = str(tmp_path / "more")  # of parts that are not given nothing is known
    assert make(tmp_path / "out", "source.rows_per_shard=1", **words)[0] is ExitCode.OK


def test_the_folder_of_the_images_is_no_out(tmp_path):
    """A rerun of an interrupted run would be refused: by then the folder is a dataset."""
    put(tmp_path / "set", **{"a.png": encoded(), "b/c.png": encoded()})
    (tmp_path / "link").symlink_to("set")
    for command, out in (("plan", "set"), ("dataset", "set"), ("dataset", "link")):
        given = [command, "--shards", str(tmp_path / "set"), "--out", str(tmp_path / out), *EMBEDDED]
        done = CliRunner().invoke(app, given)
        assert isinstance(done.exception, OutputError)
        assert str(done.exception).endswith("is the folder of the images: give another, which may lie within it.")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["a.png", "b"]


# Layouts


def test_names_that_every_folder_has_cost_no_more_for_it():
    """Of 20,000 images `person-00001/0.jpg`, each name was compared with half of those that end so: half a minute."""
    files = [f"all/person-{one:05}/{number}.JPG" for one in range(10_000) for number in (0, 1)]
    pictures = Pictures("/photos", dict.fromkeys(files), {})
    begun = time.process_time()
    for base, drop in (("", 0), ("", 4), ("all", 4), ("all/person-00000", 17)):  # named from the root, or right there
        found = [pictures._image(base if drop < 17 else posixpath.dirname(file), file[drop:]) for file in files]
        assert found == files
        assert [pictures._image(base, name[drop:-4]) for name in files[:2]] == files[:2]
    assert pictures._image("", "0.jpg") is None
    assert time.process_time() - begun < 12


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_an_imagefolder(tmp_path, kind):
    table = {"file_name": ["b.png", "cats/\u00e4.png", "b.png"], "text": ["b", "a", "again b"], "width": [9, 8, 9]}
    put(tmp_path, **{"train/b.png": encoded(1), "train/cats/a\u0308.png": encoded(2), "train/c.png": encoded(3)})
    put(tmp_path, **{"train/c.txt": "c", "train/b.txt": "not read", "train/.hidden.png": encoded(), "notes.txt": "x"})
    lines = list(zip(*table.values(), strict=True))
    if kind == "csv":
        with (tmp_path / "train/metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([list(table), *lines])
    elif kind == "jsonl":
        put(
            tmp_path,
            **{"train/metadata.jsonl": "\n".join(json.dumps(dict(zip(table, line, strict=True))) for line in lines)},
        )
    else:
        pq.write_table(pa.table(table), tmp_path / "train/metadata.parquet")
    found = rows(tmp_path)
    assert picked(found) == [
        ("train/b.png", "b", ["again b"]),
        ("train/c.png", "c", None),
        ("train/cats/a\u0308.png", "a", None),  # the same letter
    ]
    assert [row["image"] for row in found] == [encoded(1), encoded(3), encoded(2)]
    assert picked(found, "key", "meta_width")[0] == (f"{found[0]['part']}-000000000", 9)


def test_diffusiondb(tmp_path):
    for part, names in ((1, "ab"), (2, "c")):
        folder = f"images/part-{part:06d}"
        records = {f"{name}.png": {"p": f"prompt {name}", "se": 1, "sa": "k_lms"} for name in names}
        put(tmp_path, **{f"{folder}/{name}.png": encoded(ord(name)) for name in names})
        put(tmp_path, **{f"{folder}/part-{part:06d}.json": json.dumps(records)})
    assert picked(rows(tmp_path / "images/part-000001"))[0] == ("a.png", "prompt a", None)
    expected = [
        (f"images/part-00000{n}/{name}.png", f"prompt {name}", None) for n, name in ((1, "a"), (1, "b"), (2, "c"))
    ]
    assert picked(rows(tmp_path)) == expected
    for path in tmp_path.rglob("*.json"):
        path.unlink()
    table = {
        "image_name": ["x.png", *(f"{name}.png" for name in "cba")],
        "prompt": [f"prompt {name}" for name in "xcba"],
    }
    pq.write_table(
        pa.table({**table, "part_id": [7, 2, 1, 1], "image_nsfw": [0.1, 0.2, 0.9, 0.1]}), tmp_path / "metadata.parquet"
    )
    found = rows(tmp_path)
    assert picked(found) == expected
    assert picked(found, "punsafe") == [(pytest.approx(0.1),), (pytest.approx(0.9),), (pytest.approx(0.2),)]


def test_the_list_of_the_published_tutorials_which_export_json_writes(tmp_path):
    record = {"image_file": "images/a.png", "face_image_file": "faces/a.png", "text": "t", "id_embed_file": "ids/a.npy"}
    put(tmp_path, **{"images/a.png": encoded(1), "faces/a.png": encoded(2), "data.json": json.dumps([record])})
    assert picked(rows(tmp_path)) == [("faces/a.png", None, None), ("images/a.png", "t", None)]


def test_journeydb(tmp_path):
    put(tmp_path, **{"imgs/000/a.jpg": encoded(1, "JPEG"), "imgs/001/a.jpg": encoded(2, "JPEG")})
    records = [{"img_path": f"./00{n}/a.jpg", "prompt": f"p{n}", "Task2": {"Caption": "x"}} for n in (1, 0)]
    put(tmp_path, **{"train_anno.jsonl": "\n".join(map(json.dumps, records))})
    assert picked(rows(tmp_path)) == [("imgs/000/a.jpg", "p0", None), ("imgs/001/a.jpg", "p1", None)]


SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "status", "url", "caption")])


def img2dataset(layout, folder):
    """Two images and a failure, by the writers of the library itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from img2dataset import writer as library
    writer = getattr(library, f"{layout}SampleWriter")(0, str(folder), True, 5, SCHEMA, "png")
    for number, image in enumerate([encoded(1), None, encoded(2)]):
        meta = {"key": f"00000000{number}", "status": "success" if image else "failed_to_download"}
        meta |= {"url": f"http://a.org/{number}", "caption": f"caption {number}"}
        writer.write(image, meta["key"], meta["caption"], meta)
    writer.close()


@pytest.mark.parametrize(
    ("layout", "name", "failures"),
    [("Files", "00000/{}.png", 0), ("Parquet", "{}", 1), ("WebDataset", "{}.png", 1)],
)
def test_what_img2dataset_wrote_is_not_fetched_again(tmp_path, layout, name, failures):
    img2dataset(layout, tmp_path)
    found = rows(tmp_path)
    images = [row for row in found if row[DROP] is None]
    assert picked(images, "url", "text", "source_file", "text_alternatives") == [
        (f"http://a.org/{n}", f"caption {n}", name.format(f"00000000{n}"), None) for n in (0, 2)
    ]
    assert [row["image"] for row in images] == [encoded(1), encoded(2)]
    assert picked((row for row in found if row[DROP]), DROP, "url") == [("not_in_tar", "http://a.org/1")] * failures


def test_links_and_names_lead_nowhere_outside(tmp_path):
    put(tmp_path, **{"secret.txt": "key", "secret.png": encoded(9), "set/a.png": encoded(1), "set/b.png": encoded(2)})
    put(tmp_path, **{"set/_MG_1.png": encoded(3), "set/.thumbs/a.png": encoded(4)})
    for name, target in (("a.txt", "../secret.txt"), ("c.png", "../secret.png"), ("d.png", "b.png"), ("up", "..")):
        (tmp_path / "set" / name).symlink_to(target)
    for name in ("pipe.png", "pipe.csv", "pipe.tar"):
        os.mkfifo(tmp_path / "set" / name)
    lines = [["file_name", "text"], ["../secret.png", "x"], [str(tmp_path / "secret.png"), "y"], ["sub/../b.png", "b"]]
    put(tmp_path, **{"set/metadata.csv": "\n".join(map(",".join, lines))})
    assert picked(rows(tmp_path / "set")) == [
        ("_MG_1.png", None, None), ("a.png", None, None), ("b.png", "b", None), ("d.png", None, None),
    ]  # fmt: skip


def test_a_dataset_and_a_run_within_their_own_source_are_none_of_its_images(tmp_path):
    put(tmp_path, **{"a.png": encoded(1), "out/dataset.json": "{}", "out/shards/x-00000.json": "{}"})
    put(tmp_path, **{"out/b.png": encoded(2), "other/dataset.json": "{}", "other/c.png": encoded(3)})
    put(tmp_path, **{"runs/f/run.json": "{}", "runs/f/metrics.jsonl": "{}", "runs/f/validation/d.png": encoded(4)})
    pq.write_table(pa.table({"key": ["x-0"]}), tmp_path / "out/shards/x-00000.parquet")
    assert picked(rows(tmp_path), "source_file") == [("a.png",), ("other/c.png",)]


def test_what_is_meant_otherwise_is_refused_with_the_other_word(tmp_path, out):
    put(tmp_path, **{"a.png": encoded(), "zips/part-000001.zip": b"PK"})
    for spec, message in (
        (tmp_path / "zips", r"found there: part-000001\.zip\. Unpack archives first\."),
        (tmp_path / "zips/part-000001.zip", r" Unpack archives first\."),
        (tmp_path / "a.png", r"Of images, give the folder\."),
        (tmp_path / "*.png", r"Of images, give the folder\."),
        (out, r"is a finished dataset: give what it was made of\."),
    ):
        with pytest.raises(SourceError, match=message):
            find_parts(str(spec), SourceSettings())


def test_a_folder_of_links_alone_is_refused_as_such(tmp_path):
    put(tmp_path, **{"a.png": encoded(), "set/b/c.md": "x"})
    (tmp_path / "set/a.png").symlink_to("../a.png")
    with pytest.raises(SourceError, match=r"found there: a\.png, b \(links .*: give the folder that they lead to\)\.$"):
        find_parts(str(tmp_path / "set"), SourceSettings())


def test_tables_that_name_nothing_there_are_refused(tmp_path):
    put(tmp_path, **{"a.png": encoded(), "metadata.csv": "file_name,text\nb.png,x\n"})
    with pytest.raises(SourceError, match=r"metadata\.csv names no file that lies in .*: the first is 'b\.png'"):
        find_parts(str(tmp_path), SourceSettings())
    put(tmp_path, **{"bomb/a.png": encoded(), "bomb/metadata.json": "[" * 200_000})
    with pytest.raises(SourceError, match=r"metadata\.json cannot be read: "):
        find_parts(str(tmp_path / "bomb"), SourceSettings())
    with pytest.raises(SourceError, match="if file_name names files, give a folder in which it and they lie"):
        find_parts(str(tmp_path / "metadata.csv"), SourceSettings())


def test_a_table_beside_images_that_names_none_is_refused_with_what_to_do(tmp_path):
    put(tmp_path, **{"a.png": encoded(), "log.csv": "picture_file,loss\na.png,2\n"})
    with pytest.raises(SourceError, match=r"nor one that names the images beside it: --set source\.columns\.file=…"):
        find_parts(str(tmp_path), SourceSettings())
    assert picked(rows(tmp_path, columns={"file": "picture_file"}), "source_file") == [("a.png",)]
    put(tmp_path, **{"list/l.csv": "link\nhttp://a.org\n"})
    with pytest.raises(SourceError, match=r"the first line of a csv or tsv must name the columns\.$"):
        find_parts(str(tmp_path / "list"), SourceSettings())


def test_a_table_may_name_images_by_their_whole_path(tmp_path):
    folder = tmp_path / unicodedata.normalize("NFD", "ä")
    table = f"file_name,text\n{tmp_path}/ä/sub/a.png,a\n{tmp_path}/a.png,outside\n"
    put(folder, **{"sub/a.png": encoded(), "a.png": encoded(), "sub/metadata.csv": table})
    assert picked(rows(folder)) == [("a.png", None, None), ("sub/a.png", "a", None)]


def test_an_image_whose_name_is_no_text_is_a_row_and_said(tmp_path):
    put(tmp_path, **{"set/a.png": encoded(1), "set/\ufffd.png": encoded(2)})
    (tmp_path / "set" / os.fsdecode(b"\xe9")).mkdir()
    for name in (b"set/\xe9.png", b"set/\xe9/b.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(encoded(3))
    found = rows(tmp_path / "set")
    assert sorted(picked(found, "source_file", DROP), key=str) == [
        ("a.png", None), ("\ufffd.png", "no_file"), ("\ufffd.png", None), ("\ufffd/b.png", "no_file"),
    ]  # fmt: skip
    (part,) = find_parts(str(tmp_path / "set"), SourceSettings())
    assert part.pictures.named.notes == (f"{tmp_path}/set: images that are not read, as their names are no UTF-8: 2",)


# Parquet files with images


@pytest.mark.parametrize("image", ["image", "photo"])
def test_a_parquet_of_hugging_faces_datasets(tmp_path, image):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
    features = datasets.Features({image: datasets.Image(), "prompt": datasets.Value("string")})
    values = {image: [{"bytes": encoded(n), "path": f"{n}.png"} for n in (1, 2)] + [None], "prompt": ["a", "b", "c"]}
    datasets.Dataset.from_dict(values, features=features).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    found = rows(tmp_path)
    assert picked(found, "source_file", "text", DROP) == [
        ("1.png", "a", None),
        ("2.png", "b", None),
        (None, "c", "not_in_tar"),
    ]
    assert [row["image"] for row in found[:2]] == [encoded(1), encoded(2)]
    assert found[0]["key"] == "train-00000-of-00001-000000000"


def test_a_table_of_paths_in_place_of_images_is_refused_unless_it_has_urls(tmp_path):
    """As `datasets` saves them, unless it is made to embed them."""
    type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = pa.array([{"bytes": None, "path": "/photos/1.png"}] * 3 + [None], type)
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"image": cells, "text": list("abcd")}), path)
    for command in ("plan", "dataset"):
        done = CliRunner().invoke(app, [command, "--shards", str(path), "--out", str(tmp_path / "out"), *EMBEDDED])
        assert isinstance(done.exception, SourceError)
        assert str(done.exception).startswith(f"{path} holds no images, but their paths in the column image: give the ")
    assert not (tmp_path / "out").exists()
    pq.write_table(pa.table({"image": cells, "url": [f"http://a.org/{n}" for n in range(4)]}), path)
    (part,) = find_parts(str(path), SourceSettings())
    assert (part.kind, part.rows) == ("metadata", 4)
    for others in ([None, encoded(1)], []):  # one is enough, and where there are no rows nothing is known
        embedded = pa.array([{"bytes": data, "path": "1.png"} for data in others], type)
        pq.write_table(pa.table({"image": embedded}), path)
        assert find_parts(str(path), SourceSettings())[0].kind == "embedded"


@pytest.mark.parametrize("column", ["path", "file_name"])
def test_names_of_embedded_images_leave_the_folders_of_a_machine_out(tmp_path, column):
    paths = ["/home/me/a b/1.png", r"C:\Users\me\2.png", "file:///home/me/3.png", "train/4.png", "/5.png"]
    cells = [{"bytes": encoded(n), "path": path if column == "path" else None} for n, path in enumerate(paths)]
    table = {"image": cells, **({} if column == "path" else {column: paths})}
    pq.write_table(pa.table(table), tmp_path / "p.parquet")
    assert [row["source_file"] for row in rows(tmp_path)] == ["1.png", "2.png", "3.png", "train/4.png", "5.png"]


def test_cells_are_read_forwards_whoever_asks_for_them(tmp_path, monkeypatch):
    path = str(tmp_path / "p q.parquet")
    images = pa.array([encoded(n) for n in range(40)], pa.large_binary())
    pq.write_table(pa.table({"jpg@ #": images, "n": range(40)}), path, row_group_size=10)
    opened = []
    monkeypatch.setattr(stored, "_Column", lambda *words, real=stored._Column: opened.append(words) or real(*words))
    reader = stored.Stored(Settings(filter=FilterSettings(min_image_px=1)))

    def read(*numbers):
        assert reader.read([stored.of_cell(path, "jpg@ #", n) for n in numbers]) == [encoded(n) for n in numbers]
        return len(opened)

    assert [read(*range(n, n + 4)) for n in range(0, 24, 4)] == [1] * 6  # a shard, on through the groups
    assert [read(35, 34), read(36), read(24, 25), read(37)] == [1, 1, 2, 2]  # on, and another shard before it
    assert read(3) == 3
    reader.close()


class Failing(io.FileIO):
    """A file whose disk or network fails for a while."""

    error = None

    def readinto(self, buffer):
        if Failing.error:
            raise Failing.error
        return super().readinto(buffer)

    def read(self, size=-1):
        if Failing.error:
            raise Failing.error
        return super().read(size)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "is gone"), ClientPayloadError("is gone")], ids=["disk", "net"])
def test_a_read_that_failed_costs_no_row_once_it_is_tried_again(tmp_path, monkeypatch, error):
    path = str(tmp_path / "p.parquet")
    pq.write_table(pa.table({"jpg": [encoded(n) for n in range(40)]}), path, row_group_size=16)
    monkeypatch.setattr(stored.fsspec, "open", lambda path, _: SimpleNamespace(open=lambda: Failing(path)))
    reader = stored.Stored(Settings(filter=FilterSettings(min_image_px=1)))
    refs = [stored.of_cell(path, "jpg", n) for n in range(40)]
    assert reader.read(refs[:16]) == [encoded(n) for n in range(16)]
    monkeypatch.setattr(Failing, "error", error)
    with pytest.raises(SourceError, match="is gone"):
        reader.read(refs[16:])
    monkeypatch.setattr(Failing, "error", None)
    assert reader.read(refs[16:]) == [encoded(n) for n in range(16, 40)]
    reader.close()


# Tars of any origin


def tar(path, **files):
    with tarfile.open(path, "w") as out:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return path


def test_tars_of_made_images(tmp_path):
    meta = [json.dumps(one).encode() for one in ({"prompt": "p", "seed": 1}, {"seed": 2, "model": "m"})]
    path = tar(
        tmp_path / "t.tar",
        **{"./0.jpg": encoded(1), "./0.json": meta[0], "./0.txt": b"t", "d/1.png": encoded(2), "d/1.json": meta[1]},
        **{"d/1.txt": b"from the txt", "2.v1.jpg": encoded(3)},
        **{"._0.jpg": b"\0\5\x16\7", "d/.1.png": encoded(4), ".jpg": encoded(5)},  # as macOS's tar has them, and none
    )
    found = rows(f"made:{path}")
    assert picked(found) == [("0.jpg", "p", ["t"]), (None, None, None), ("d/1.png", "from the txt", None)]
    assert picked(found, "source_kind", DROP) == [("made", None), ("made", "not_in_tar"), ("made", None)]


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("a.v1.jpg", "a.txt"), "in a.v1.jpg, the suffix is all behind the first dot"),
        (("x-0.arcface.npy", "x-0.face.jpg"), "x-0.face.jpg is a finished dataset's: give what that was made of"),
        (("a.wav", "a.txt", "b.wav", "b.txt"), "there are a.wav, a.txt, b.wav, …"),
    ],
)
def test_a_tar_without_samples_is_refused(tmp_path, names, why):
    path = tar(tmp_path / "Set.tar", **dict.fromkeys(names, b"x"))
    for command in ("plan", "dataset"):
        done = CliRunner().invoke(app, [command, "--shards", str(path), "--out", str(tmp_path / "out"), *EMBEDDED])
        assert isinstance(done.exception, SourceError)
        assert str(done.exception).startswith(f"{path} holds no image that is one of a sample: ")
        assert why in str(done.exception)


# Captions and columns


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_caption_beside_an_image_is_its_own_however_accents_are_written(tmp_path, forms):
    image, caption = (unicodedata.normalize(form, "grüße/ä") for form in forms)
    put(tmp_path, **{f"{image}.png": encoded(), f"{caption}.txt": "an umlaut"})
    put(tmp_path, **{f"{caption}.png.json": '{"mine": "more"}'})
    assert picked(rows(tmp_path, columns={"text": "mine"})) == [(f"{image}.png", "more", ["an umlaut"])]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_how_a_caption_is_written(tmp_path, encoding):
    """As Windows writes it: UTF-16 became a caption of zeros and broken letters, and its JSON a drop."""
    put(tmp_path, **{"a.png": encoded(), "a.txt": "Zoë".encode(encoding), "b.png": encoded()})
    put(tmp_path, **{"b.json": json.dumps({"caption": "Zoë"}, ensure_ascii=False).encode(encoding)})
    assert picked(rows(tmp_path), "text", "broken") == [("Zoë", None), ("Zoë", None)]


def test_the_suffix_of_a_caption_may_be_in_capitals(tmp_path):
    put(tmp_path, **{"a.JPG": encoded(), "a.TXT": "A", "b.jpg": encoded(), "b.txt": "b", "b.TXT": "other"})
    assert picked(rows(tmp_path), "text", "text_alternatives") == [("A", None), ("b", None)]


def test_captions_of_other_names_and_lists(tmp_path):
    table = {"url": ["http://a.org/1", "http://a.org/2"], "top_caption": ["t", ""], "all_captions": [["l", "m"], None]}
    pq.write_table(pa.table({**table, "laion_caption": ["t", "laion"]}), tmp_path / "p.parquet")
    assert picked(rows(tmp_path / "p.parquet"), "text", "text_alternatives") == [("t", ["l", "m"]), ("laion", None)]
    found = rows(tmp_path / "p.parquet", columns={"text": "all captions"})
    assert picked(found, "text", "text_alternatives") == [("l", ["m"]), (None, None)]


@pytest.mark.parametrize(
    ("columns", "source", "message"),
    [
        ({"url": ["u"], "text": pa.array([{"en": "x"}])}, {}, r"has struct<en: string> in the column for text"),
        ({"url": ["u"], "width": [[1]]}, {}, r"has list<\w+: int64> in the column for meta_width"),
        ({"url": ["u"], "caption1": ["x"]}, {"text": "caption"}, r"does not have, did you mean caption1\?"),
        ({"link": ["u"]}, {"url": "lnk"}, r"source.columns.url is 'lnk', which .*p.parquet does not have"),
        ({"image": ["u"], "t": ["x"]}, {}, r"if it holds URLs, --set source.columns.url=image"),
    ],
)
def test_columns_that_cannot_be_read_are_refused_before_anything_is_written(tmp_path, columns, source, message):
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    words = [word for name, column in source.items() for word in ("--set", f"source.columns.{name}={column}")]
    for command in ("plan", "dataset"):
        given = [command, "--shards", str(tmp_path), "--out", str(tmp_path / "out"), *EMBEDDED, *words]
        done = CliRunner().invoke(app, given)
        assert isinstance(done.exception, SourceError)
        assert re.search(message, str(done.exception))
    assert not (tmp_path / "out").exists()


def test_a_name_in_source_columns_that_a_folder_or_tar_does_not_have_is_refused(tmp_path):
    """As of tables, where the nearest name, or those that are there, are shown."""
    put(tmp_path, **{"set/a.png": encoded(), "set/a.json": '{"my_caption": "a", "w": 9}', "set/b.png": encoded()})
    put(tmp_path, **{"set/metadata.json": '[{"file_name": "b.png", "note": "b"}]'})
    tar(tmp_path / "t.tar", **{"a.png": encoded(), "a.json": b'{"my_caption": "a"}', "b.png": encoded()})
    tar(tmp_path / "u.tar", **{"a.png": encoded()})
    pq.write_table(pa.table({"key": ["a"], "my_caption": ["a"]}), tmp_path / "u.parquet")
    for name in ("set", "t.tar", "u.tar"):
        found = rows(tmp_path / name, columns={"text": "My-Caption"})
        assert picked(found, "text")[0] == ("a",)
        with pytest.raises(
            SourceError, match=rf"^source.columns.text is 'my_caption1', which .*{name} does not have, "
        ):
            rows(tmp_path / name, columns={"text": "my_caption1"})
    assert picked(rows(tmp_path / "set", columns={"text": "note"}), "text") == [(None,), ("b",)]
    with pytest.raises(SourceError, match=r"does not have: it has file_name, note, my_caption, w\.$"):
        rows(tmp_path / "set", columns={"nsfw": "sfw"})


def test_plan_and_run_count_captions_and_links(tmp_path):
    put(tmp_path, **{"x.txt": "x", "set/a.png": encoded(), "set/b.png": encoded(), "set/c.png": encoded()})
    table = "file_name,url\nc.png,http://a.org\nd.png,\n"
    put(tmp_path, **{"set/b.json": '{"captions": ["1", "2"]}', "set/m.csv": table})
    (tmp_path / "set/a.txt").symlink_to("../x.txt")
    for command in ("plan", "dataset"):
        done = CliRunner().invoke(
            app, [command, "--shards", str(tmp_path / "set"), "--out", str(tmp_path / "out"), *EMBEDDED]
        )
        assert done.exit_code == 0
        text = " ".join(done.output.split())
        assert "Captions: 1 of 3 rows that pass the metadata filter; 1 have several, of which the first counts" in text
        assert "set: left out, as links that lead out of it or no files: 1" in text
        assert "m.csv: of 2 rows, 1 name no file that is there." in text
        assert text.startswith("Starting local: 1 part of 3 rows, profile embedded. ") is (command == "dataset")


def test_captions_of_broken_letters_are_counted(tmp_path):
    put(tmp_path, **{"a.png": encoded(), "a.txt": "Zoë".encode("latin-1"), "b.png": encoded(), "b.txt": "Zoë"})
    said = CliRunner().invoke(app, ["plan", "--shards", str(tmp_path), *EMBEDDED]).output
    assert "Captions: 2 of 2 rows that pass the metadata filter; 1 hold \ufffd, which stands for bytes that" in said


def test_where_no_image_has_a_caption_it_is_said_where_captions_may_stand(tmp_path):
    put(tmp_path, **{"a.png": encoded()})
    said = CliRunner().invoke(app, ["plan", "--shards", str(tmp_path), *EMBEDDED]).output
    assert "Captions: 0 of 1 rows that pass the metadata filter; they are read from .txt files beside images" in said
