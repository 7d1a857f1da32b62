"""Hosts that fail, ask for rest, or drip: what they cost themselves, and what they must not cost the others."""

import threading
import time

import pyarrow as pa
import pytest
import servers

from stages.base import DROP
from stages.download import Download
from stages.fetch.manners import hosts
from stages.runtime import Runtime
from stages.settings import DownloadSettings, Settings

says, head = servers.says, servers.head


pytestmark = pytest.mark.usefixtures("names")


@pytest.fixture
def make():
    made = []

    def stage(engine="native", **told):
        base = {"engine": engine, "allow_loopback": True, "timeout_s": 10.0, "retries": 0, "respect_robots": False}
        made.append(Download(Settings(download=DownloadSettings(**base | told)), Runtime()))
        return made[-1]

    yield stage
    for download in made:
        download.close()


def table(urls):
    return pa.table({"url": pa.array(urls, pa.string()), "image_ref": pa.nulls(len(urls), pa.string())})


def fetch(stage, *urls):
    return stage(table(urls))[DROP].to_pylist()


def test_drops_host_down(make, server, engine):
    download = make(engine, host_failures=3, per_host=1)
    url = server.url("/reset.jpg")
    assert fetch(download, *[url] * 3) == ["connection_error"] * 3
    assert fetch(download, *[url] * 50, server.url("/ok.jpg")) == ["host_down"] * 51
    assert server.hits == {"/reset.jpg": 3}
    assert fetch(download, f"http://other.test:{server.port}/ok.jpg") == [None]


def test_a_host_that_comes_back_is_fetched_from_again(make, server, engine, monkeypatch):
    monkeypatch.setattr(hosts, "_FIRST_REST_S", 0.3)
    download = make(engine, host_failures=3)
    fetch(download, *[server.url("/reset.jpg")] * 3)
    assert fetch(download, server.url("/ok.jpg")) == ["host_down"]
    time.sleep(0.35)
    # one of these is the probe, and the others wait for what it finds
    assert fetch(download, *[server.url("/ok.jpg")] * 6) == [None] * 6


def test_while_it_is_down_one_row_at_a_time_tries(make, server, engine, monkeypatch):
    monkeypatch.setattr(hosts, "_FIRST_REST_S", 0.3)
    download = make(engine, host_failures=3)
    fetch(download, *[server.url("/reset.jpg")] * 3)
    time.sleep(0.35)
    outcomes = fetch(download, *[server.url("/reset.jpg")] * 6)
    assert sorted(outcomes) == ["connection_error"] + ["host_down"] * 5
    assert server.hits["/reset.jpg"] == 4


def test_a_host_that_fails_now_and_then_stays_up(make, server, engine):
    download = make(engine, host_failures=3, per_host=1)
    urls = [server.url(path) for path in ("/500.jpg", "/reset.jpg", "/404.jpg")] * 5
    # One by one: which of several rows has its turn next is not told.
    outcomes = [outcome for url in urls for outcome in fetch(download, url)]
    assert outcomes == ["server_error", "connection_error", "not_found"] * 5


def test_rows_in_the_queue_of_a_host_learn_that_it_is_down(make, server, engine):
    download = make(engine, host_failures=4, per_host=2, timeout_s=0.4)
    outcomes = fetch(download, *[server.url("/drips-body.jpg")] * 60)
    assert outcomes.count("timeout") <= 5
    assert set(outcomes) == {"timeout", "host_down"}


@pytest.mark.parametrize("path", ["/drips-body.jpg", "/drips-head.jpg", "/reset-midway.jpg", "/500.jpg", "/429.jpg"])
def test_what_counts_as_a_failure(make, server, path):
    server.answers["/429.jpg"] = says("429 Too Many Requests")
    download = make(host_failures=2, timeout_s=0.4)
    fetch(download, *[server.url(path)] * 2)
    assert fetch(download, server.url("/ok.jpg")) == ["host_down"]


def test_retry_after_rests_the_whole_host(make, server, engine):
    server.answers["/busy.jpg"] = servers.first_then(
        says("429 Too Many Requests", Retry_After="1"), servers.ANSWERS["/ok.jpg"]
    )
    download = make(engine, timeout_s=3.0)
    assert fetch(download, server.url("/busy.jpg")) == ["rate_limited"]
    begun = time.monotonic()
    assert fetch(download, server.url("/ok.jpg"), f"http://other.test:{server.port}/404.jpg") == [None, "not_found"]
    (ok,) = [moment for path, moment in server.times if path == "/ok.jpg"]
    (other,) = [moment for path, moment in server.times if path == "/404.jpg"]
    assert ok - begun > 0.8
    assert other < ok


def test_a_long_retry_after_is_heeded_without_asking(make, server, engine):
    download = make(engine)
    assert fetch(download, server.url("/429.jpg")) == ["rate_limited"]
    assert fetch(download, *[server.url("/ok.jpg")] * 9) == ["rate_limited"] * 9
    assert server.hits == {"/429.jpg": 1}


def test_rows_that_wait_for_a_host_hold_no_turns(make, server):
    server.answers["/busy.jpg"] = says("429 Too Many Requests", Retry_After="1")
    download = make(concurrency=2, timeout_s=3.0)
    fetch(download, server.url("/busy.jpg"))
    waiting = [server.url("/ok.jpg")] * 4
    others = [f"http://other.test:{server.port}/404.jpg"] * 4
    assert fetch(download, *waiting, *others) == [None] * 4 + ["not_found"] * 4
    assert max(moment for path, moment in server.times if path == "/404.jpg") < min(
        moment for path, moment in server.times if path == "/ok.jpg"
    )


def test_a_dripping_host_costs_its_own_deadline_only(make, server):
    """Rows of a host that drips, strewn among good ones: these are fetched before the first deadline has passed."""
    download = make(timeout_s=4.0, per_host=4, host_failures=0)
    urls = [f"http://h{n % 40}.test:{server.port}/ok.jpg" for n in range(120)]
    for n in range(4):
        urls.insert(n * 25, f"http://slow.test:{server.port}/drips-body.jpg")
    begun = time.monotonic()
    outcomes = fetch(download, *urls)
    assert (outcomes.count(None), outcomes.count("timeout")) == (120, 4)
    assert max(moment for path, moment in server.times if path == "/ok.jpg") - begun < 4.0


def test_a_redirect_to_another_host_holds_a_connection_of_that_host(make, server):
    """Not more than per_host at a time, though the rows come by as many hosts as there are rows."""
    most, running, lock = [0], [0], threading.Lock()

    def slow(link, hostile_server):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.05)
        with lock:
            running[0] -= 1
        servers.ANSWERS["/ok.jpg"](link, hostile_server)

    server.answers["/slow.jpg"] = slow
    server.answers["/away.jpg"] = servers.redirects(f"http://busy.test:{server.port}/slow.jpg")
    urls = [f"http://h{n}.test:{server.port}/away.jpg" for n in range(30)]
    assert fetch(make(per_host=2, timeout_s=60.0), *urls) == [None] * 30
    assert most[0] == 2


def test_hosts_that_redirect_to_each_other_do_not_stop_each_other(make, server):
    server.answers["/to-b.jpg"] = servers.redirects(f"http://b.test:{server.port}/ok.jpg")
    server.answers["/to-a.jpg"] = servers.redirects(f"http://a.test:{server.port}/ok.jpg")
    urls = [f"http://{host}.test:{server.port}/to-{other}.jpg" for host, other in ("ab", "ba")] * 20
    assert fetch(make(per_host=1, timeout_s=60.0), *urls) == [None] * 40
