"""The metadata stage: each reason by a row that provokes it, and the whole against a plain row-by-row model."""

from urllib.parse import urlsplit

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.columns import schema
from stages.base import DROP
from stages.metadata import Metadata, SeenUrls
from stages.runtime import Runtime
from stages.settings import FilterSettings, MetadataSettings, Settings

GOOD = {"url": "https://example.org/a.jpg", "meta_width": 1024, "meta_height": 1024}


def table(rows):
    return pa.Table.from_pylist(rows, schema=schema(Metadata.reads))


def judge(*rows, stage=None, **metadata):
    stage = stage or Metadata(Settings(metadata=MetadataSettings(**metadata)), Runtime())
    result = stage(table([GOOD | row for row in rows]))
    assert result.column_names == [DROP]
    return result.column(DROP).to_pylist()


def test_a_row_without_evidence_is_a_candidate():
    assert judge({"meta_width": None, "meta_height": None}) == [None]
    assert judge() == []


def test_drops_bad_metadata():
    assert judge({"broken": True}, {"broken": True, "image_ref": "a.jpg#"}, {}) == ["bad_metadata"] * 2 + [None]


@pytest.mark.parametrize(
    "url",
    [
        None, "", "   ", "example.org/a.jpg", "//example.org/a.jpg", "ftp://example.org/a.jpg", "file:///etc/passwd",
        "data:image/png;base64,AAAA", "http://", "http:///a.jpg", "http://?q", "http://..", "https:/example.org/a.jpg",
        "http://user@/a.jpg", "http://example.org:99999/a.jpg", "http://example.org:http/a.jpg", "http://[::1/a.jpg",
        "http://exa mple.org/a.jpg", "http://example.org\\a.jpg", "http://example.org/a\nb.jpg", "javascript:alert(1)",
    ],
)  # fmt: skip
def test_drops_bad_url(url):
    assert judge({"url": url}) == ["bad_url"]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org", "HTTPS://EXAMPLE.ORG/A.JPG", "http://example.org:8080/a b.jpg", "http://127.0.0.1:65535/x",
        "http://user:secret@example.org/a.jpg", "http://[2001:db8::1]:80/a.jpg", "http://münchen.example/ä.jpg",
        "http://example.org?u=http://other.org/@", "  http://example.org/a.jpg\t", "http://a_b.example.org/#x",
    ],
)  # fmt: skip
def test_keeps_unusual_but_valid_urls(url):
    assert judge({"url": url}) == [None]


def test_drops_duplicate_url():
    stage = Metadata(Settings(), Runtime())
    other = {"url": "https://example.org/b.jpg"}
    assert judge({}, other, {}, {"url": " https://example.org/a.jpg "}, stage=stage) == [
        None, None, "duplicate_url", "duplicate_url",
    ]  # fmt: skip
    assert judge(other, {"url": "https://example.org/A.jpg"}, stage=stage) == ["duplicate_url", None]
    assert judge({"url": "http://EXAMPLE.org:80/b.jpg#x"}, stage=stage) == ["duplicate_url"]


def test_only_candidates_make_duplicates():
    assert judge({"meta_width": 10}, {"punsafe": 0.9}, {}, {}) == ["small_image", "unsafe", None, "duplicate_url"]


@pytest.mark.parametrize("row", [{"nsfw": "NSFW"}, {"nsfw": " nsfw "}, {"punsafe": 0.51}, {"punsafe": 1.0}])
def test_drops_unsafe(row):
    assert judge(row) == ["unsafe"]


def test_unsafe_follows_the_settings():
    assert judge({"nsfw": "UNSURE"}) == [None]
    assert judge({"nsfw": "UNSURE"}, nsfw_tags=("unsure",)) == ["unsafe"]
    assert judge({"punsafe": 0.5}) == [None]
    assert judge({"punsafe": 0.3}, max_punsafe=0.3) == [None]
    assert judge({"punsafe": 0.3}, max_punsafe=0.2) == ["unsafe"]


def test_drops_watermark():
    rows = {"pwatermark": 0.81}, {"pwatermark": 0.8, "url": "http://b.org"}, {"pwatermark": None, "url": "http://c.org"}
    # 0.8 is more than 0.8 when float32 is compared with double.
    assert judge(*rows) == ["watermark", None, None]
    assert judge({"pwatermark": float("nan")}) == [None]


@pytest.mark.parametrize("sides", [(1023, 4000), (4000, 1023), (1023, None), (None, 1), (10, 10)])
def test_drops_small_image(sides):
    assert judge({"meta_width": sides[0], "meta_height": sides[1]}) == ["small_image"]


def test_one_large_side_alone_is_no_evidence():
    assert judge({"meta_width": 5000, "meta_height": None}) == [None]
    stage = Metadata(Settings(filter=FilterSettings(min_image_px=10)), Runtime())
    assert judge({"meta_width": 10, "meta_height": 10}, stage=stage) == [None]


def test_the_first_of_several_reasons_stands():
    worst = {"url": "ftp://x", "punsafe": 1.0, "pwatermark": 1.0, "meta_width": 1}
    better = [worst, worst | {"url": "http://x.org"}]
    better.append(better[-1] | {"punsafe": 0.0})
    better.append(better[-1] | {"pwatermark": 0.0})
    assert judge(*better) == ["bad_url", "unsafe", "watermark", "small_image"]


def test_rows_of_an_existing_download_need_no_url_but_nothing_else_is_forgiven():
    ref = {"image_ref": "/d/0.tar#512:99"}
    assert judge(ref | {"url": None}, ref | {"url": "nonsense"}, ref | {"url": None}) == [None, None, None]
    assert judge(ref | {"meta_width": 5}, ref | {"nsfw": "NSFW"}) == ["small_image", "unsafe"]
    assert judge(ref, ref) == [None, "duplicate_url"]


def test_a_row_whose_download_failed_hides_no_later_copy():
    missing, there = {"image_ref": ""}, {"image_ref": "/d/0.tar#512:99"}
    assert judge(missing, missing, there, there) == [None, None, None, "duplicate_url"]


@given(st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=12))
def test_seen_urls_remembers_all_batches(batches):
    seen, model = SeenUrls(), set()
    for batch in batches:
        urls = table([{"url": f"http://x.org/{number}"} for number in batch])
        expected = []
        for number in batch:
            expected.append(number in model)
            model.add(number)
        assert seen.repeats(urls, pa.array(range(len(batch)), pa.int64()).to_numpy()).tolist() == expected


ROWS = st.fixed_dictionaries(
    {
        "url": st.sampled_from(
            [None, "", "ftp://x", "http://a.org/1", "http://a.org/2", " http://a.org/2", "http://b.org"]
        ),
        "image_ref": st.sampled_from([None, None, "", "/t.tar#0:1"]),
        "meta_width": st.sampled_from([None, 1, 1023, 1024, 3000]),
        "meta_height": st.sampled_from([None, 1, 1024]),
        "nsfw": st.sampled_from([None, "UNLIKELY", "NSFW"]),
        "punsafe": st.sampled_from([None, 0.0, 0.5, 0.75]),
        "pwatermark": st.sampled_from([None, 0.0, 0.75, 0.875]),
    }
)


def plainly(row, seen):
    url = (row["url"] or "").strip()
    known = [side for side in (row["meta_width"], row["meta_height"]) if side]
    if row["image_ref"] is None and not (urlsplit(url).scheme in ("http", "https") and urlsplit(url).hostname):
        return "bad_url"
    if row["nsfw"] == "NSFW" or (row["punsafe"] or 0) > 0.5:
        return "unsafe"
    if (row["pwatermark"] or 0) > 0.8:
        return "watermark"
    if known and min(known) < 1024:
        return "small_image"
    if row["url"] is None or row["image_ref"] == "":
        return None
    if url in seen:
        return "duplicate_url"
    seen.add(url)
    return None


@settings(deadline=None)
@given(st.lists(ROWS, max_size=25), st.integers(1, 26))
def test_agrees_with_the_plain_rule_however_the_rows_are_batched(rows, size):
    stage, seen = Metadata(Settings(), Runtime()), set()
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    found = [verdict for batch in batches for verdict in stage(table(batch)).column(DROP).to_pylist()]
    assert found == [plainly(row, seen) for row in rows]


def test_every_declared_reason_has_a_witness_here():
    assert {f"test_drops_{reason}" for reason in Metadata.drops} <= set(globals())
