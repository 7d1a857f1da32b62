import pytest

from schemas.drops import Dropped, DropReason
from stages.fetch.address import parse
from stages.fetch.manners import refusals
from stages.fetch.manners.refusals import Refusals

A, B = parse("http://a.test/x.jpg"), parse("http://a.test/y.jpg")


def reason_of(memory, url):
    try:
        memory.check(url)
    except Dropped as dropped:
        return dropped.reason
    return None


@pytest.fixture
def shared(tmp_path):
    return str(tmp_path / "refusals")


def test_processes_share_a_file(shared):
    first, second = Refusals(shared), Refusals(shared)
    first.add([A], DropReason.OPTED_OUT)
    assert reason_of(second, A) is None
    second.refresh()
    second.add([A, B], DropReason.ACCESS_DENIED)
    assert (reason_of(second, A), reason_of(second, B)) == ("opted_out", "access_denied")
    first.refresh()
    assert reason_of(first, B) == "access_denied"
    third = Refusals(shared)
    third.refresh()
    assert (reason_of(third, A), reason_of(third, B)) == ("opted_out", "access_denied")


def test_half_a_record_and_bytes_without_sense_do_no_harm(shared):
    first, second = Refusals(shared), Refusals(shared)
    first.add([A], DropReason.OPTED_OUT)
    with open(shared, "ab") as file:
        file.write(b"\xff" * 9 + b"half")
    second.refresh()
    assert reason_of(second, A) == "opted_out"
    with open(shared, "ab") as file:
        file.write(b"xxxxx")
    first.add([B], DropReason.OPTED_OUT)
    second.refresh()
    assert reason_of(second, B) == "opted_out"


def test_the_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(refusals, "_MOST", 10)
    memory = Refusals("")
    urls = [parse(f"http://a.test/{n}") for n in range(100)]
    memory.add(urls, DropReason.OPTED_OUT)
    assert [reason_of(memory, url) for url in (urls[0], urls[90], urls[99])] == [None, "opted_out", "opted_out"]
