"""The list of what was forgotten: what it makes of the rows of a later run, and how it compares addresses."""

import time

import pyarrow as pa
import pytest

from pipeline.dataset.out.forgotten import Forgotten, load, normal_domain, save
from pipeline.dataset.rows import WITNESS_SCHEMA, Rows, split_seeds
from schemas.columns import LEDGER_SCHEMA, SEED_SCHEMA

KEPT_URL = "http://photos.example/a/0.jpg"
KEYS = [f"a-{row:09d}" for row in range(12)]


# ---- what later runs make of it


def seeds(*urls):
    table = pa.Table.from_pylist(
        [
            {"key": key, "part": "a", "row": row, "url": url, "text": "words"}
            for row, (key, url) in enumerate(zip(KEYS, urls, strict=False))
        ],
        schema=SEED_SCHEMA,
    )
    judged = [None, "duplicate_url", *[None] * 10][: len(urls)]
    stages = [verdict and "metadata" for verdict in judged]
    return table.append_column("verdict", pa.array(judged, pa.string())).append_column(
        "stage", pa.array(stages, pa.string())
    )


def test_a_later_run_blanks_the_rows_before_anything_is_fetched():
    known = Forgotten("salt").and_urls(["http://x.example/a"]).and_domains(["gone.example"])
    judged = known.judged(
        seeds("http://x.example/a", "https://X.example/a", "http://b.gone.example/", "http://y.example/", None)
    )
    parted = split_seeds(judged)
    assert parted.alive["key"].to_pylist() == [KEYS[3], KEYS[4]]
    assert parted.alive["text"].to_pylist() == ["words"] * 2
    dead = parted.dead.to_pylist()
    assert [row["verdict"] for row in dead] == ["forgotten"] * 3
    assert {name for row in dead for name, value in row.items() if value is not None} == {
        "key",
        "part",
        "row",
        "verdict",
        "stage",
    }
    assert judged.schema == seeds("http://x.example/a").schema
    assert Forgotten("salt").judged(judged) is judged


def test_a_later_run_withholds_the_file_that_comes_from_yet_another_url():
    known = Forgotten("salt").and_contents(["ab" * 32])
    fetched = [("u", "ab" * 32), ("v", "cd" * 32), ("w", "ab" * 32)]
    alive = pa.Table.from_pylist(
        [
            {"key": KEYS[row], "part": "a", "row": row, "url": url, "sha256": found, "image": b"bytes"}
            for row, (url, found) in enumerate(fetched)
        ]
    )
    small = {
        "key": KEYS[5],
        "part": "a",
        "row": 5,
        "url": "x",
        "sha256": "ab" * 32,
        "verdict": "small_image",
        "stage": "size",
    }
    dead = pa.Table.from_pylist([small, {**small, "key": KEYS[6], "row": 6, "sha256": None}], schema=LEDGER_SCHEMA)
    pictures = [
        {"key": KEYS[5], "verdict": "small_image", "image": b"5"},
        {"key": KEYS[6], "verdict": "small_image", "image": b"6"},
    ]
    (found,) = known.withheld(iter([Rows(alive, dead, pa.Table.from_pylist(pictures, schema=WITNESS_SCHEMA))]))
    assert found.alive["key"].to_pylist() == [KEYS[1]]
    assert found.witnesses["key"].to_pylist() == [KEYS[6]]
    told = {row["key"]: row for row in found.dead.to_pylist()}
    assert {key: row["verdict"] for key, row in told.items()} == {
        KEYS[0]: "forgotten", KEYS[2]: "forgotten", KEYS[5]: "forgotten", KEYS[6]: "small_image",
    }  # fmt: skip
    assert all(told[key]["url"] is None and told[key]["sha256"] is None for key in (KEYS[0], KEYS[2], KEYS[5]))
    assert told[KEYS[6]]["url"] == "x"


# ---- how addresses are compared


@pytest.mark.parametrize(
    ("text", "host"),
    [("localhost", "localhost"), ("127.0.0.1:80", "127.0.0.1"), ("bücher.example", "xn--bcher-kva.example")],
)
def test_forms_of_sites(text, host):
    assert normal_domain(text) == host


def test_an_address_is_no_site_below_another():
    known = Forgotten("salt").and_domains(["0.0.1"])
    assert not known.concerns_url("http://127.0.0.1/")
    assert Forgotten("salt").and_domains(["127.0.0.1"]).concerns_url("https://127.0.0.1:99/x")


def test_what_is_saved_is_loaded(tmp_path):
    known = Forgotten("salt").and_urls([KEPT_URL]).and_domains(["example.org"]).and_contents(["ab" * 32])
    save(tmp_path, known)
    assert load(tmp_path) == known
    assert not load(tmp_path / "none")
    assert load(tmp_path / "none").salt != load(tmp_path / "none").salt


def test_looking_rows_up_is_quick():
    """A ledger has a row per input row: a million of them must not take minutes."""
    known = Forgotten("salt").and_urls([KEPT_URL]).and_domains(["example.org"])
    table = pa.table({"url": [f"https://host{n % 300}.example/{n}/photo-{n}.jpg?size={n}" for n in range(20_000)]})
    started = time.process_time()
    assert not known.urls_in(table).any()
    assert time.process_time() - started < 1.0
