import errno
import hashlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
import servers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from schemas.columns import COLUMNS
from schemas.drops import DropReason
from schemas.errors import SourceError
from stages.base import DROP
from stages.download import Download
from stages.fetch.address import Guard
from stages.fetch.stored import of_file
from stages.runtime import Runtime
from stages.settings import DownloadSettings, Settings

NATIVE = "native"
BOTH = [NATIVE, pytest.param("img2dataset", marks=pytest.mark.long)]
PRIVATE = {"intranet.test": "10.0.0.1", "metadata.test": "169.254.169.254", "mapped.test": "::ffff:192.168.0.1"}
LOOPBACK = {"a.test": "127.0.0.1", "b.test": "127.0.0.1", "localhost": "127.0.0.1"}


@pytest.fixture
def hostile_server():
    server = servers.HostileServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def network(monkeypatch):
    """Names come from a table, and nothing connects beyond loopback; `tried` lists the addresses of all connections."""
    tried, real_lookup, real_connect = [], socket.getaddrinfo, socket.socket.connect

    def lookup(host, port, family=0, type=0, proto=0, flags=0):
        return real_lookup({**LOOPBACK, **PRIVATE}.get(host, host), port, family, type, proto, socket.AI_NUMERICHOST)

    def connect(link, place):
        tried.append(place[0])
        if not place[0].startswith("127."):
            raise OSError(errno.EACCES, "beyond loopback")
        return real_connect(link, place)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket.socket, "connect", connect, raising=False)
    lookup.tried = tried
    return lookup


@pytest.fixture
def stage():
    """A function that makes stages, and closes them in the end."""
    made = []

    def make(engine=NATIVE, min_image_px=1024, runtime=None, **download):
        told = {"engine": engine, "allow_loopback": True, "timeout_s": 3.0, "max_bytes": 2_000_000, "max_redirects": 3}
        told["respect_robots"] = False  # one request per row; tests/stages/fetch/test_download_robots.py is about these
        settings = Settings(download=DownloadSettings(**told | download), filter={"min_image_px": min_image_px})
        made.append(Download(settings, runtime or Runtime()))
        return made[-1]

    yield make
    for download in made:
        download.close()


def rows(urls=(), refs=None):
    refs = [None] * len(urls) if refs is None else refs
    return pa.table({"url": pa.array(urls, pa.string()), "image_ref": pa.array(refs, pa.string())})


def fetch(stage, *urls):
    """Reasons (or None) of URLs."""
    return stage(rows(list(urls)))[DROP].to_pylist()


def row_of(stage, url):
    return stage(rows([url])).to_pylist()[0]


# What is kept


@pytest.mark.parametrize(
    "path",
    ["/ok.jpg", "/query.jpg?a=1&b=%2F", "/without-length.jpg", "/chunked.jpg", "/hop1.jpg", "/noai-for-others.jpg"],
)
def test_a_good_image_is_kept_with_its_hash_and_length(stage, hostile_server, engine, path):
    row = row_of(stage(engine), hostile_server.url(path))
    assert row == {
        "image": servers.LARGE,
        "sha256": hashlib.sha256(servers.LARGE).hexdigest(),
        "n_bytes": len(servers.LARGE),
        "width": None,
        "height": None,
        DROP: None,
    }


def test_the_written_columns_have_their_types(stage):
    download = stage()
    table = download(rows([]))
    assert table.column_names == [*Download.writes, DROP]
    assert all(table.schema.field(name).type == COLUMNS[name].type for name in Download.writes)


def test_a_compressed_image_is_unpacked(stage, hostile_server):
    assert row_of(stage(), hostile_server.url("/gzip.jpg"))["image"] == servers.LARGE


def test_respect_opt_out_can_be_switched_off(stage, hostile_server, engine):
    assert fetch(stage(engine, respect_opt_out=False), hostile_server.url("/noai.jpg")) == [None]


def test_requests_say_who_asks_and_keep_no_cookies(stage, hostile_server, engine):
    hostile_server.answers["/cookie.jpg"] = servers.says(body=servers.LARGE, Set_Cookie="id=1; Path=/")
    download = stage(engine, contact="mail@example.org")
    fetch(download, hostile_server.url("/cookie.jpg"))
    fetch(download, hostile_server.url("/cookie.jpg"))
    for head in (text.lower() for text in hostile_server.heads):
        assert "user-agent: faceshards/" in head
        assert "mail@example.org" in head
        assert "accept-encoding: identity" in head
        assert "cookie:" not in head


# Why rows are dropped


@pytest.mark.parametrize(
    "url", [None, "", "  ", "nonsense", "ftp://a.test/x.jpg", "http://", "http://a.test:x/", "file:///etc/hostname"]
)
def test_drops_bad_url(stage, engine, url):
    assert fetch(stage(engine), url) == [DropReason.BAD_URL]


@pytest.mark.parametrize("path", ["/to-file.jpg", "/to-ftp.jpg", "/to-nonsense.jpg"])
def test_drops_bad_url_of_a_redirect(stage, hostile_server, engine, path):
    assert fetch(stage(engine), hostile_server.url(path)) == [DropReason.BAD_URL]


@pytest.mark.parametrize("path", ["/small.jpg", "/small-then-huge.jpg"])
def test_drops_small_image(stage, hostile_server, engine, path):
    row = row_of(stage(engine, max_bytes=2 * servers.HUGE), hostile_server.url(path))
    assert row == {
        "image": None,
        "sha256": None,
        "n_bytes": None,
        "width": 300,
        "height": 300,
        DROP: DropReason.SMALL_IMAGE,
    }


@pytest.mark.parametrize("path", ["/small-then-huge.jpg", "/page-then-huge.jpg", "/endless.jpg"])
def test_a_hopeless_body_is_not_read_to_its_end(stage, hostile_server, engine, path):
    fetch(stage(engine, max_bytes=servers.HUGE * 2 if "then" in path else 2_000_000), hostile_server.url(path))
    hostile_server.settle()
    assert hostile_server.poured < servers.HUGE / 4


@pytest.mark.parametrize("path", ["/page.jpg", "/page-then-huge.jpg"])
def test_drops_not_an_image(stage, hostile_server, engine, path):
    assert fetch(stage(engine, max_bytes=servers.HUGE * 2), hostile_server.url(path)) == [DropReason.NOT_AN_IMAGE]


FORBIDDEN = [
    "http://169.254.169.254/latest/meta-data",
    "http://10.0.0.1/",
    "http://intranet.test/",
    "http://metadata.test/",
    "http://mapped.test/",
    "http://[::ffff:10.0.0.1]/",
    "http://167772161/",
    "http://0xa.1/",
    "http://0.0.0.0/",
]


@pytest.mark.parametrize("url", FORBIDDEN)
def test_drops_forbidden_address(stage, network, engine, url):
    assert fetch(stage(engine), url) == [DropReason.FORBIDDEN_ADDRESS]
    assert network.tried == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "a.test", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_drops_forbidden_address_loopback_unless_allowed(stage, hostile_server, network, engine, host):
    assert fetch(stage(engine, allow_loopback=False), f"http://{host}:{hostile_server.port}/ok.jpg") == [
        DropReason.FORBIDDEN_ADDRESS
    ]
    assert network.tried == []


@pytest.mark.parametrize("path", ["/to-metadata.jpg", "/to-private.jpg", "/to-private-name.jpg"])
def test_drops_forbidden_address_of_a_redirect(stage, hostile_server, network, engine, path):
    assert fetch(stage(engine), hostile_server.url(path)) == [DropReason.FORBIDDEN_ADDRESS]
    assert set(network.tried) == {"127.0.0.1"}


def test_a_name_cannot_change_its_address_after_the_check(stage, hostile_server, network, engine, monkeypatch):
    answers = iter(["127.0.0.1"])
    first = network

    def rebinding(host, *args, **kwargs):
        return first(next(answers, "10.0.0.1") if host == "rebind.test" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    assert fetch(stage(engine), f"http://rebind.test:{hostile_server.port}/ok.jpg") == [None]
    assert network.tried == ["127.0.0.1"]


def test_of_several_addresses_only_the_allowed_are_tried(stage, hostile_server, network, engine, monkeypatch):
    def lookup(host, *args, **named):
        hosts = ["10.0.0.1", "127.0.0.1"] if host == "both.test" else [host]
        return [place for each in hosts for place in network(each, *args, **named)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert fetch(stage(engine), f"http://both.test:{hostile_server.port}/ok.jpg") == [None]
    assert set(network.tried) == {"127.0.0.1"}


def test_drops_forbidden_address_when_all_of_several_are(stage, network, engine, monkeypatch):
    def lookup(host, *args, **named):
        return [place for each in ("10.0.0.1", "10.0.0.2") for place in network(each, *args, **named)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert fetch(stage(engine), "http://twins.test/") == [DropReason.FORBIDDEN_ADDRESS]
    assert network.tried == []


def test_the_last_lock_holds_alone(stage, network, monkeypatch):
    monkeypatch.setattr(Guard, "route", lambda guard, url: url)
    assert fetch(stage(), "http://10.0.0.1/") == [DropReason.FORBIDDEN_ADDRESS]
    assert network.tried == []


@pytest.mark.parametrize("host", ["unknown.test", "a..b", f"{'x' * 70}.test"])
def test_drops_dns_error(stage, engine, host):
    assert fetch(stage(engine), f"http://{host}/x.jpg") == [DropReason.DNS_ERROR]


def test_drops_connection_error(stage, engine):
    assert fetch(stage(engine), f"http://127.0.0.1:{servers.free_port()}/x.jpg") == [DropReason.CONNECTION_ERROR]


@pytest.mark.parametrize("path", ["/reset.jpg", "/hangs-up.jpg"])
def test_drops_connection_error_after_the_request_twice(stage, hostile_server, engine, path):
    assert fetch(stage(engine), hostile_server.url(path)) == [DropReason.CONNECTION_ERROR]
    assert hostile_server.hits[path] == 2


@pytest.mark.parametrize("path", ["/drips-body.jpg", "/drips-head.jpg"])
def test_drops_timeout(stage, hostile_server, engine, path):
    begun = time.monotonic()
    assert fetch(stage(engine, timeout_s=0.5), hostile_server.url(path)) == [DropReason.TIMEOUT]
    assert time.monotonic() - begun < 25  # it drips for thirty seconds


@pytest.mark.parametrize("status", [404, 410])
def test_drops_not_found(stage, hostile_server, engine, status):
    assert fetch(stage(engine), hostile_server.url(f"/{status}.jpg")) == [DropReason.NOT_FOUND]
    assert sum(hostile_server.hits.values()) == 1


@pytest.mark.parametrize("status", [401, 403, 451])
def test_drops_access_denied(stage, hostile_server, engine, status):
    assert fetch(stage(engine), hostile_server.url(f"/{status}.jpg")) == [DropReason.ACCESS_DENIED]


def test_drops_rate_limited(stage, hostile_server, engine):
    assert fetch(stage(engine), hostile_server.url("/429.jpg")) == [DropReason.RATE_LIMITED]
    assert hostile_server.hits["/429.jpg"] == 1


@pytest.mark.parametrize("path", ["/418.jpg", "/300.jpg", "/to-nowhere.jpg", "/garbage.jpg"])
def test_drops_http_error(stage, hostile_server, engine, path):
    assert fetch(stage(engine), hostile_server.url(path)) == [DropReason.HTTP_ERROR]


@pytest.mark.parametrize("path", ["/bad-gzip.jpg", "/bad-length.jpg", "/bad-chunk.jpg"])
def test_drops_http_error_of_what_only_the_native_engine_sees(stage, hostile_server, path):
    assert fetch(stage(), hostile_server.url(path)) == [DropReason.HTTP_ERROR]


@pytest.mark.parametrize("status", [500, 503])
def test_drops_server_error(stage, hostile_server, engine, status):
    assert fetch(stage(engine), hostile_server.url(f"/{status}.jpg")) == [DropReason.SERVER_ERROR]


def test_drops_redirect_loop(stage, hostile_server, engine):
    assert fetch(stage(engine), hostile_server.url("/loop.jpg")) == [DropReason.REDIRECT_LOOP]
    assert hostile_server.hits["/loop.jpg"] == 4
    assert fetch(stage(engine, max_redirects=2), hostile_server.url("/hop1.jpg")) == [DropReason.REDIRECT_LOOP]


@pytest.mark.parametrize("path", ["/endless.jpg", "/announces-too-much.jpg"])
def test_drops_too_many_bytes(stage, hostile_server, engine, path):
    assert fetch(stage(engine), hostile_server.url(path)) == [DropReason.TOO_MANY_BYTES]


def test_drops_too_many_bytes_of_a_bomb(stage, hostile_server):
    assert fetch(stage(), hostile_server.url("/bomb.jpg")) == [DropReason.TOO_MANY_BYTES]


@pytest.mark.parametrize("path", ["/empty.jpg", "/empty-without-length.jpg", "/no-content.jpg"])
def test_drops_empty_body(stage, hostile_server, engine, path):
    assert fetch(stage(engine), hostile_server.url(path)) == [DropReason.EMPTY_BODY]


@pytest.mark.parametrize("path", ["/truncated.jpg", "/truncated-chunk.jpg", "/reset-midway.jpg"])
def test_drops_incomplete_body(stage, hostile_server, engine, path):
    assert fetch(stage(engine), hostile_server.url(path)) == [DropReason.INCOMPLETE_BODY]


@pytest.mark.parametrize("path", ["/noai.jpg", "/noindex-for-us.jpg"])
def test_drops_opted_out(stage, hostile_server, engine, path):
    assert fetch(stage(engine), hostile_server.url(path)) == [DropReason.OPTED_OUT]
    assert hostile_server.hits[path] == 1


def test_drops_opted_out_of_a_redirect_without_following_it(stage, hostile_server, engine):
    hostile_server.answers["/hop.jpg"] = servers.says("302 Found", X_Robots_Tag="noai", Location="/ok.jpg")
    assert fetch(stage(engine), hostile_server.url("/hop.jpg")) == [DropReason.OPTED_OUT]
    assert hostile_server.hits["/ok.jpg"] == 0


# Existing downloads


@pytest.fixture
def tar(tmp_path):
    """A file with LARGE at 512, SMALL after it, and HTML at its end."""
    path = tmp_path / "00000.tar"
    path.write_bytes(bytes(512) + servers.LARGE + servers.SMALL + servers.HTML)
    return path


def test_rows_of_an_existing_download_are_read_and_not_fetched(stage, tar, hostile_server):
    after = 512 + len(servers.LARGE)
    refs = [f"{tar}#{after}:{len(servers.SMALL)}", None, f"file://{tar}#512:{len(servers.LARGE)}", "", f"{tar}#0:0"]
    table = stage()(rows([hostile_server.url("/404.jpg")] * 5, refs)).to_pylist()
    assert [row[DROP] for row in table] == ["small_image", "not_found", None, "not_in_tar", "empty_body"]
    assert table[2]["image"] == servers.LARGE
    assert (table[0]["width"], table[0]["height"]) == (300, 300)
    assert hostile_server.hits.total() == 1


def test_drops_not_in_tar(stage, tar):
    beyond = f"{tar}#{tar.stat().st_size - 10}:4000"
    assert stage()(rows([None, None], ["", beyond]))[DROP].to_pylist() == [DropReason.NOT_IN_TAR] * 2


def test_drops_no_file(stage, tmp_path):
    folder = tmp_path / "photos #1"
    folder.mkdir()
    (folder / "a:1@2.jpg").write_bytes(servers.LARGE)
    (folder / "small.jpg").write_bytes(servers.SMALL)
    refs = [of_file(f"{folder}/{name}") for name in ("gone.jpg", "small.jpg", "a:1@2.jpg")]
    download = stage()
    table = download(rows([None] * 3, refs))
    assert table[DROP].to_pylist() == [DropReason.NO_FILE, DropReason.SMALL_IMAGE, None]
    assert table["image"][2].as_py() == servers.LARGE
    folder.rename(tmp_path / "elsewhere")  # as a disk that is not mounted
    with pytest.raises(SourceError, match=r"gone\.jpg cannot be read"):
        download(rows([None] * 3, refs))


def test_an_absent_tar_is_the_users_trouble(stage, tmp_path):
    with pytest.raises(SourceError, match=r"gone\.tar"):
        stage()(rows([None], [f"{tmp_path}/gone.tar#0:10"]))


# The bundled sample


def test_the_sample_is_fetched_from_its_port_though_loopback_is_forbidden(stage, hostile_server, network, engine):
    download = stage(engine, allow_loopback=False, runtime=Runtime(sample_port=hostile_server.port))
    paths = ["/ok.jpg", "/hop1.jpg", "/404.jpg"]
    assert fetch(download, *(f"http://sample.localhost{path}" for path in paths)) == [None, None, "not_found"]
    other = f"http://127.0.0.1:{servers.free_port()}/"
    network.tried.clear()
    assert fetch(download, other) == [DropReason.FORBIDDEN_ADDRESS]
    assert fetch(stage(engine, allow_loopback=False), "http://sample.localhost/ok.jpg") != [None]
    assert network.tried == []


# Retries, turns and threads


@pytest.mark.parametrize("path", ["/500-once.jpg", "/truncated-once.jpg"])
def test_a_transient_failure_is_tried_again(stage, hostile_server, engine, path):
    assert fetch(stage(engine), hostile_server.url(path)) == [None]
    assert hostile_server.hits[path] == 2


def test_no_retry_means_no_retry(stage, hostile_server, engine):
    assert fetch(stage(engine, retries=0), hostile_server.url("/500-once.jpg")) == [DropReason.SERVER_ERROR]


def test_retry_after_is_waited_for(stage, hostile_server, engine):
    assert fetch(stage(engine), hostile_server.url("/429-once.jpg")) == [None]
    (_, first), (_, second) = hostile_server.times
    assert second - first >= 1


def test_waiting_for_a_turn_does_not_count_against_the_deadline(stage, hostile_server, engine):
    def slow(link, server):
        time.sleep(0.25)
        servers.ANSWERS["/ok.jpg"](link, server)

    hostile_server.answers["/slow.jpg"] = slow
    begun = time.monotonic()
    assert fetch(stage(engine, per_host=2, timeout_s=1.5), *[hostile_server.url("/slow.jpg")] * 14) == [None] * 14
    assert time.monotonic() - begun > 7 * 0.25  # two at a time: longer in all than the deadline of one


OUTCOMES = {
    "/ok.jpg": None,
    "/small.jpg": "small_image",
    "/404.jpg": "not_found",
    "/page.jpg": "not_an_image",
    "/noai.jpg": "opted_out",
    "/hop1.jpg": None,
    "/empty.jpg": "empty_body",
}


@pytest.fixture(scope="module")
def shared():
    """One server and one stage for many small tries."""
    server = servers.HostileServer()
    told = DownloadSettings(allow_loopback=True, per_host=64, respect_robots=False)
    download = Download(Settings(download=told), Runtime())
    yield server, download
    download.close()
    server.close()


@given(paths=st.lists(st.sampled_from(sorted(OUTCOMES)), max_size=12))
@hypothesis_settings(max_examples=25, deadline=None)
def test_one_outcome_per_row_in_order(shared, paths):
    server, download = shared
    assert fetch(download, *map(server.url, paths)) == [OUTCOMES[path] for path in paths]


@pytest.mark.parametrize("name", BOTH)
def test_eight_threads_may_call_at_once(stage, hostile_server, name):
    download = stage(name, per_host=32)

    def call(turn):
        paths = [list(OUTCOMES)[(turn + step) % len(OUTCOMES)] for step in range(20)]
        return fetch(download, *map(hostile_server.url, paths)) == [OUTCOMES[path] for path in paths]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(16)))


@pytest.mark.parametrize("name", BOTH)
def test_trouble_of_this_machine_stops_the_shard(stage, hostile_server, name, monkeypatch):
    def connect(link, place):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket.socket, "connect", connect, raising=False)
    with pytest.raises((OSError, RuntimeError, ExceptionGroup)):
        fetch(stage(name), hostile_server.url("/ok.jpg"))


def test_a_drop_holds_no_body(stage, hostile_server):
    (outcome,) = stage()._engine.stream([hostile_server.url("/endless.jpg")])
    assert (outcome.__traceback__, outcome.__cause__, outcome.__context__) == (None, None, None)


def test_a_closed_stage_leaves_no_thread(hostile_server):
    before = set(threading.enumerate())
    download = Download(Settings(download=DownloadSettings(allow_loopback=True)), Runtime())
    fetch(download, hostile_server.url("/ok.jpg"))
    download.close()
    mine = {thread for thread in set(threading.enumerate()) - before if thread.name == "faceshards-fetch"}
    assert mine == set()
