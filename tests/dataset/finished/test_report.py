import base64
import hashlib
import json
import re
import shutil
import urllib.parse
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path

import fake_dataset as fake
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.dataset.finished import report
from pipeline.dataset.finished.report import quotas, spread, write_report
from pipeline.dataset.out import ledger
from pipeline.dataset.out.ledger import read_manifests, shard_names
from pipeline.shared.files import to_path
from schemas.errors import CorruptShardError, OutputError
from schemas.shard import Manifest
from stages.pixels.images import encode_jpeg

VOID = {"meta", "img", "br", "link", "input", "hr"}
EVIL = "<script>alert('x')</script>\"'><img src=http://evil.example/x onerror=y>&amp;\u202e{{ 7*7 }}"


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words, self.codes = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.codes.append(data)
        else:
            self.words.append(data)

    @cached_property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def values(self, tag, name):
        return [value for known, attribute, value in self.attributes if (known, attribute) == (tag, name)]


def text_of(out):
    write_report(out)
    return (out / report.REPORT).read_text(encoding="utf-8")


def page_of(out):
    return Page(text_of(out))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    shards = {"a-00000": fake.mixed("a"), "a-00001": fake.mixed("a", 6), "b-00000": fake.mixed("b")}
    return fake.write(tmp_path_factory.mktemp("published"), shards)


@pytest.fixture
def out(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "out"))


def test_the_page_tells_funnel_samples_drops_and_models(out):
    page = page_of(out)
    assert "6 of 18 rows kept (33.3 %)" in page.text
    for words in ("unsafe −3 (16.7 %)", "not_found", "small_face · 3", "grabcut", "Apache-2.0", "profile embedded"):
        assert words in page.text
    for row in (*fake.mixed("a"), *fake.mixed("a", 6), *fake.mixed("b")):
        assert row["key"] in page.text
    assert "caption of row 10" in page.text
    assert "1280 × 1024 · face 300 px · score 0.87 · sharpness 1235" in page.text
    assert "the photo is too small" in page.text, "an absent crop says why"
    assert "http://photos.example/a/2.jpg" in page.text, "a 404 has no picture, but its URL is there"
    assert "the server answered 404 or 410" in page.text
    assert "has not finished" not in page.text


def test_pictures_are_inside_the_page_and_nothing_is_fetched(out):
    page = page_of(out)
    pictures = page.values("img", "src")
    # photo, face, mask and portrait of six samples (half is absent), and a thumbnail of small_face per shard
    assert len(pictures) == 6 * 4 + 3
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in pictures)
    assert not {"iframe", "object", "embed", "base"} & set(page.tags)
    assert page.values("link", "href") == ["data:,"]
    assert all(target.startswith("#") for target in page.values("a", "href"))
    assert {name for _, name, _ in page.attributes} & {"onerror", "onclick", "srcset", "action"} == set()
    assert page.values("script", "src") == []


def test_no_script_runs_but_the_pages_own(out):
    page = page_of(out)
    (policy,) = [value for value in page.values("meta", "content") if "default-src 'none'" in value]
    own = base64.b64encode(hashlib.sha256(page.codes[-1].encode()).digest()).decode()
    assert re.findall(r"script-src ([^;]*)", policy) == [f"'sha256-{own}'"]
    assert page.values("script", "type") == ["application/json"]
    assert page.tags.count("script") == 2


def test_without_pictures_no_face_is_in_the_page(out):
    write_report(out, pictures=False)
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert page.values("img", "src") == []
    assert "a-000000000" in page.text


def test_captions_and_crops_that_samples_lack_are_seen_at_once(tmp_path):
    rows = [fake.record("a", row, text="") for row in range(3)]
    page = page_of(fake.write(tmp_path, {"a-00000": rows}))
    assert "captions 0 of 3 crop portrait 3 of 3 crop half 0 of 3" in page.text
    assert page.values("div", "class").count("bad") == 2


def test_captions_by_a_model_are_counted_where_there_was_one(tmp_path):
    rows = [fake.record("a", row, further_chars=(0, 9, 9, None)[row]) for row in range(4)]
    assert (
        "captions 4 of 4 further captions 2 of 3 crop portrait" in page_of(fake.write(tmp_path, {"a-00000": rows})).text
    )


def test_all_rows_count_not_those_alone_that_are_shown(tmp_path):
    rows = [fake.record("a", row, text="one two" if row % 2 else "") for row in range(30)]
    rows += [fake.dead("a", 50 + n, "metadata", "unsafe", caption_chars=100 * n) for n in range(3)]
    rows += [fake.dead("a", 53, "embed_face", "bad_embedding", caption_chars=9, crops_made=["half"])]
    page = page_of(fake.write(tmp_path, {"a-00000": rows}))
    assert "captions 15 of 30 all rows: 18 of 34 crop portrait 30 of 30 crop half 0 of 30" in page.text
    assert re.search(r"median [78] characters of 15 kept, \d+ characters of 3 dropped", page.text), (
        "a distribution for either"
    )


def test_where_nothing_was_kept_all_rows_say_whether_there_are_captions(tmp_path):
    rows = [fake.dead("a", n, "download", "not_found", caption_chars=0) for n in range(4)]
    text = page_of(fake.write(tmp_path, {"a-00000": rows})).text
    assert "captions 0 of 4 none was kept" in text
    assert "crop portrait" not in text


def test_hosts_are_counted_by_what_became_of_their_rows(out):
    page = page_of(out)
    assert "photos.example 18 6" in page.text
    assert "kept 6, dropped later 6, failed 3, refused 0, not tried 3" in page.values("div", "title")


def test_distributions_set_kept_and_dropped_apart(out):
    page = page_of(out)
    assert "median 280 px of 6 kept, 83 px of 6 dropped" in page.text, "as far as bins are wide"


def test_the_same_dataset_gives_the_same_page(out):
    assert text_of(out) == text_of(out)
    assert not list(out.glob(".tmp-*"))


@pytest.mark.parametrize("field", ["text", "url"])
def test_hostile_words_stay_words(tmp_path, field):
    url = {"url": EVIL} if field == "url" else {}
    rows = [fake.record("a", 0, **{field: EVIL}), fake.dead("a", 1, "download", "not_found") | url]
    text = text_of(fake.write(tmp_path, {"a-00000": rows}))
    page = Page(text)
    assert page.tags.count("script") == 2
    assert "<script>alert" not in text
    assert all(uri.startswith("data:") for uri in page.values("img", "src"))
    assert re.sub(r"\s+", " ", EVIL) in page.text
    assert text.count("<script") == text.count("</script>") == 2


def test_a_caption_that_is_no_unicode_or_endless_is_shown_in_part(tmp_path):
    content = fake.record("a", 0)["json"].decode().replace("caption of row 0", "\\ud800" + "long " * 100_000)
    page = page_of(fake.write(tmp_path, {"a-00000": [fake.record("a", 0, json=content.encode())]}))
    assert "?long long" in page.text
    assert len(page.text) < 28_000


def test_a_dataset_that_kept_nothing_has_a_page(tmp_path):
    page = page_of(fake.write(tmp_path, {"a-00000": [fake.dead("a", 0, "size", "small_image", width=800, height=600)]}))
    assert "0 of 1 rows kept (0.0 %)" in page.text
    assert "Nothing was kept. Most rows, 1 of 1, are small_image : a side of the image is shorter than" in page.text
    assert "No row was kept." in page.text
    assert "800 × 600" in page.text


def test_what_a_run_has_not_has_no_section_and_its_parts_name_it(tmp_path):
    out = fake.write(tmp_path, {"mine-00000": [fake.dead("a", 0, "download", "no_file") | {"url": None}]})
    text = text_of(out)
    assert "<title>faceshards: mine: 0 of 1 rows kept</title>" in text
    assert "Hosts" not in text
    assert "<h3 hidden>Quality of the face</h3>" in text, "of which nothing was measured"
    assert "#drop-no_file" in Page(text).values("a", "href")
    assert "drop-no_file" in Page(text).values("section", "id")


def test_a_run_that_finished_nothing_has_a_page(tmp_path):
    page = page_of(fake.write(tmp_path, {}, finish=False))
    assert "0 of 0 rows kept" in page.text
    assert "has not finished" in page.text
    assert "No shard is done yet." in page.text


def test_shards_without_manifest_are_not_shown(out):
    (out / "shards" / "b-00000.json").unlink()
    page = page_of(out)
    assert "4 of 12 rows kept" in page.text
    assert "b-000000000" not in page.text


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"junk")])
def test_thumbnails_are_disposable(out, damage):
    for path in (out / "drops").iterdir():
        damage(path)
    page = page_of(out)
    assert len(page.values("img", "src")) == 6 * 4
    assert "a-000000003 http://photos.example/a/3.jpg" in page.text


def test_shards_copied_without_dataset_json_have_a_page(out):
    (out / "dataset.json").unlink()
    assert "6 of 18 rows kept" in page_of(out).text


def test_a_damaged_tar_is_named(out):
    (out / "shards" / "a-00001.tar").write_bytes(b"junk" * 300)
    with pytest.raises(CorruptShardError, match=r"a-00001\.tar"):
        write_report(out)


@pytest.mark.parametrize("changes", [{"json": b"{}"}, {"face": b"junk"}, {"mask": b"junk"}, {"json": b"[" * 100_000}])
def test_a_damaged_sample_is_named(tmp_path, changes):
    out = fake.write(tmp_path, {"a-00000": [fake.record("a", 0, **changes)]})
    with pytest.raises(CorruptShardError, match=r"a-00000\.tar: a-000000000 cannot be shown"):
        write_report(out)


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_a_broken_dataset_json_is_named(out, text):
    (out / "dataset.json").write_text(text)
    with pytest.raises(CorruptShardError, match=r"dataset\.json"):
        write_report(out)


def test_users_mistakes_are_one_sentence(tmp_path, out):
    with pytest.raises(OutputError, match="holds no dataset"):
        write_report(tmp_path / "nowhere")
    (out / "report.html").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(out)
    assert not list(out.glob(".tmp-*"))


def test_samples_come_from_all_over_the_dataset(tmp_path):
    shards = {f"p{n:02d}-00000": [fake.record(f"p{n:02d}", row) for row in range(2)] for n in range(30)}
    page = page_of(fake.write(tmp_path, shards))
    shown = re.findall(r"p(\d\d)-00000000(\d)\b", page.text)
    assert len(shown) == 24
    numbers = [int(shard) for shard, _ in shown]
    assert numbers == sorted(set(numbers))
    assert max(np.diff(numbers)) <= 2
    assert numbers[-1] >= 27


def manifest(shard, kept):
    return Manifest(shard, "embedded", "", kept, kept, {}, [], {})


@pytest.mark.parametrize(
    ("kept", "shown"), [([5, 0, 5], [3, 0, 3]), ([100, 1], [5, 1]), ([2, 1], [2, 1]), ([0], [0]), ([], [])]
)
def test_shares_of_the_contact_sheet(kept, shown):
    manifests = [manifest(str(n), count) for n, count in enumerate(kept)]
    assert [quotas(manifests, 6)[known.shard] for known in manifests] == shown


def test_spread_takes_the_first_and_spaces_evenly():
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread(range(3), 4) == [0, 1, 2]
    assert spread([], 4) == []


def test_only_the_first_samples_of_a_few_shards_are_read(tmp_path, monkeypatch):
    out = fake.write(tmp_path, {"p-00000": [fake.record("p", row, **fake.pictures(row % 5)) for row in range(40)]})
    tar = out / "shards" / "p-00000.tar"
    with tar.open("r+b") as stream:
        stream.seek(tar.stat().st_size * 32 // 40)
        stream.write(b"\xff" * 10_000)
    assert len(page_of(out).values("img", "src")) == 24 * 4
    opened = []
    real = report.samples
    monkeypatch.setattr(report, "samples", lambda path, **words: opened.append(path.name) or real(path, **words))
    for number in range(1, 30):
        fields = json.loads((out / "shards" / "p-00000.json").read_text()) | {"shard": f"p-{number:05d}"}
        (out / "shards" / f"p-{number:05d}.json").write_text(json.dumps(fields))
        for suffix in ("tar", "parquet"):
            (out / "shards" / f"p-{number:05d}.{suffix}").hardlink_to(out / "shards" / f"p-00000.{suffix}")
    assert len(read_manifests(out)) == 30
    write_report(out)
    assert len(opened) == 24


def test_each_manifest_is_read_once(out, monkeypatch):
    read, real = [], ledger.read_manifest
    monkeypatch.setattr(ledger, "read_manifest", lambda out, shard: read.append(shard) or real(out, shard))
    write_report(out)
    assert read == shard_names(out)


def test_what_is_barely_kept_or_dropped_is_shown_wherever_it_lies(tmp_path):
    rows = [fake.record("a", row, face_px=132.0 if row in (100, 105) else 300.0) for row in range(110)]
    face = {"n_faces": 1, "bbox": fake.BBOX, "kps": fake.KPS, "width": 1280, "height": 1024, "second_score": 0.0}
    photo = encode_jpeg(fake.drawn(1280, 1024), 90)
    sizes = {200: 50.0, 201: 127.0, 202: 90.0}
    rows += [fake.dead("a", row, "filter", "small_face", photo, **face, face_px=size) for row, size in sizes.items()]
    out = fake.write(tmp_path, {"a-00000": rows})
    page = page_of(out)
    assert page.tags.count("article") == 24 + 2
    assert re.findall(r"a-000000(1\d\d)", page.text) == ["100", "105"]
    assert re.findall(r"a-000000(2\d\d)", page.text) == ["201", "200", "202"], "the last has no picture"
    MemoryFileSystem().put(str(out), "/barely", recursive=True)
    write_report(to_path("memory://barely"))
    assert MemoryFileSystem().cat_file("/barely/report.html") == (out / "report.html").read_bytes()


def test_noisy_pictures_do_not_make_an_endless_page(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (512, 640, 3), np.uint8)
    noisy = {"full": encode_jpeg(noise, 95), "portrait": encode_jpeg(noise[:480, :480], 95)}
    photo = encode_jpeg(noise[:300, :300], 95)
    rows = [fake.record("a", row, **noisy) for row in range(24)]
    reasons = [reason for reason in fake.plan().reasons for _ in range(2)]
    rows += [fake.dead("a", 24 + n, "detect", reason, photo) for n, reason in enumerate(reasons)]
    out = fake.write(tmp_path, {"a-00000": rows})
    page = page_of(out)
    assert (out / "report.html").stat().st_size < 5_000_000
    assert 10 < page.tags.count("article") < 24
    assert all(row["key"] in page.text for row in rows[24:]), "what has no picture any more has its line"


def test_the_page_is_part_of_the_package():
    assert (Path(report.__file__).parent / "report.html.jinja").is_file()


@pytest.mark.parametrize("text", ["http://x/?a=1&b=2", urllib.parse.quote("ü ö")])
def test_addresses_are_shown_as_they_are(tmp_path, text):
    out = fake.write(tmp_path, {"a-00000": [fake.dead("a", 0, "download", "not_found") | {"url": text}]})
    assert text in page_of(out).text
