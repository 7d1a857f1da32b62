"""The list of what is to be forgotten: whom it concerns, and that it is written and read whole."""

import time
from dataclasses import replace

import pyarrow as pa
import pytest

from pipeline.dataset.out.forgotten import FORGOTTEN, Forgotten, load, normal_domain, save

KEPT_URL = "http://photos.example/a/0.jpg"


@pytest.mark.parametrize(
    ("text", "host"),
    [("localhost", "localhost"), ("127.0.0.1:80", "127.0.0.1"), ("bücher.example", "xn--bcher-kva.example")],
)
def test_forms_of_sites(text, host):
    assert normal_domain(text) == host


def test_an_address_is_no_site_below_another():
    known = Forgotten("salt").adding(domains=["0.0.1"])
    assert not known.concerns_url("http://127.0.0.1/")
    assert Forgotten("salt").adding(domains=["127.0.0.1"]).concerns_url("https://127.0.0.1:99/x")


def test_what_is_saved_is_loaded(tmp_path):
    known = Forgotten("salt").adding(urls=[KEPT_URL], domains=["example.org"], contents=["ab" * 32])
    save(tmp_path, known)
    assert load(tmp_path) == known
    assert not load(tmp_path / "none")
    assert load(tmp_path / "none").salt != load(tmp_path / "none").salt
    assert b"lists" not in (tmp_path / FORGOTTEN).read_bytes(), "as before there was such an entry"
    save(tmp_path, replace(known, lists="ef" * 32))
    assert load(tmp_path) == replace(known, lists="ef" * 32)


def test_looking_rows_up_is_quick():
    """A ledger has a row per input row: a million of them must not take minutes."""
    known = Forgotten("salt").adding(urls=[KEPT_URL], domains=["example.org"])
    table = pa.table({"url": [f"https://host{n % 300}.example/{n}/photo-{n}.jpg?size={n}" for n in range(20_000)]})
    started = time.process_time()
    assert not known.rows_in(table).any()
    assert time.process_time() - started < 1.0
