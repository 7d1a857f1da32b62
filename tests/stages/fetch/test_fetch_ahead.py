"""A stream: outcomes in order, rows fetched ahead of their turn, bounded in rows and in bytes, never stuck."""

import threading
import time

import pytest
import servers

from stages.fetch import ahead
from stages.fetch.img2dataset import Img2dataset
from stages.fetch.native import Native
from stages.runtime import Runtime
from stages.settings import DownloadSettings, Settings

pytestmark = pytest.mark.usefixtures("names")
ENGINES = {"native": Native, "img2dataset": Img2dataset}


@pytest.fixture
def make(engine):
    made = []

    def start(**settings):
        base = {"allow_loopback": True, "timeout_s": 60.0, "retries": 0, "respect_robots": False}
        made.append(ENGINES[engine](Settings(download=DownloadSettings(**base | settings)), Runtime()))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.fixture
def release(server):
    """/slow.jpg is not answered before this is set."""
    event = threading.Event()
    server.answers["/slow.jpg"] = lambda link, _: event.wait(60) and servers.ANSWERS["/ok.jpg"](link, _)
    yield event
    event.set()


def settled(count):
    """A count that has begun, and not changed for half a second."""
    last = None
    until = time.monotonic() + 60
    while ((now := count()) != last or not now) and time.monotonic() < until:
        last = now
        time.sleep(0.5)
    return last


def started(outcomes):
    """Begin to take all outcomes in a thread: the list that they go to, and the thread."""
    taken = []
    thread = threading.Thread(target=lambda: taken.extend(outcomes), daemon=True)
    thread.start()
    return taken, thread


def test_outcomes_come_in_order_and_those_behind_a_slow_one_are_fetched_meanwhile(make, server, release):
    paths = ["/slow.jpg", "/ok.jpg", "/404.jpg", "/small.jpg"] + ["/ok.jpg"] * 30
    taken, thread = started(make().stream(map(server.url, paths)))
    assert settled(server.hits.total) == len(paths)
    assert not taken
    release.set()
    thread.join(60)
    words = [outcome.reason.value if isinstance(outcome, Exception) else "image" for outcome in taken]
    assert words == ["image", "image", "not_found", "small_image"] + ["image"] * 30


def test_so_many_are_begun_before_their_turn_and_no_more(make, server, release):
    read = []
    urls = (read.append(n) or server.url("/ok.jpg" if n else "/slow.jpg") for n in range(100))
    taken, thread = started(make().stream(urls, most_rows=10))
    assert settled(server.hits.total) <= len(read) <= 11
    assert not taken
    release.set()
    thread.join(60)
    assert len(taken) == 100


@pytest.mark.parametrize("hosts", [1, 40])
def test_what_waits_for_its_turn_is_bounded_in_bytes(make, server, release, hosts, monkeypatch):
    """Rows of one host queue for its connections, and the one whose turn it is may be the last of them."""
    monkeypatch.setattr(ahead, "MOST_BYTES", 10 * len(servers.LARGE))
    monkeypatch.setattr(ahead, "_NEAR", 4)
    urls = [f"http://h{n % hosts}.test:{server.port}/ok.jpg" for n in range(200)]
    urls.insert(50, f"http://slow.test:{server.port}/slow.jpg")
    taken, thread = started(make(concurrency=8, per_host=4).stream(urls))
    assert settled(lambda: len(taken)) == 50
    assert settled(server.hits.total) <= 51 + 10 + 8 + 4
    release.set()
    thread.join(60)
    assert len(taken) == 201
    assert not [outcome for outcome in taken if isinstance(outcome, Exception)]


def test_a_stream_that_is_given_up_asks_for_no_more(make, server, release):
    engine = make(concurrency=2, per_host=2)
    outcomes = engine.stream(server.url("/ok.jpg") for _ in range(2000))
    next(outcomes)
    outcomes.close()
    count = settled(server.hits.total)
    assert count < 2000
    assert next(engine.stream([server.url("/404.jpg")])).reason == "not_found"


def test_nothing_is_a_stream_too(make):
    assert list(make().stream([])) == []
