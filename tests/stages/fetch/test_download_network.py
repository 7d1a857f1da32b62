"""The native engine's connections: TLS, names, addresses, connections that are used again, floods; img2dataset's too
where it makes a promise."""

import contextlib
import os
import socket
import ssl
import threading
import time
from pathlib import Path

import hostile
import pyarrow as pa
import pytest
import servers

from schemas.drops import DropReason
from stages.base import DROP
from stages.download import Download
from stages.fetch.body import Body
from stages.fetch.engine import RESOLVER
from stages.fetch.http import client, resolve
from stages.fetch.http.client import tls_context
from stages.runtime import Runtime
from stages.settings import DownloadSettings, Settings

says, head = servers.says, servers.head
CERTIFICATE = Path(__file__).with_name("tls.pem")
"""A key and a certificate for tls.test, made for these tests."""


pytestmark = pytest.mark.usefixtures("names")


@pytest.fixture
def make():
    made = []

    def stage(**told):
        base = {"allow_loopback": True, "timeout_s": 2.0, "retries": 0, "respect_robots": False}
        made.append(Download(Settings(download=DownloadSettings(**base | told)), Runtime()))
        return made[-1]

    yield stage
    for download in made:
        download.close()


def fetch(stage, *urls):
    table = pa.table({"url": pa.array(urls, pa.string()), "image_ref": pa.nulls(len(urls), pa.string())})
    return stage(table)[DROP].to_pylist()


# TLS


class TlsServer(servers.HostileServer):
    """The same answers over TLS."""

    def _serve(self, plain):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        try:
            super()._serve(context.wrap_socket(plain, server_side=True))
        except OSError:
            plain.close()


@pytest.fixture
def tls(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    tls_context.cache_clear()
    made = TlsServer()
    yield made
    made.close()
    tls_context.cache_clear()


def test_images_come_over_tls(make, tls, engine):
    paths = ["/ok.jpg", "/chunked.jpg", "/without-length.jpg", "/404.jpg", "/hop1.jpg", "/small-then-huge.jpg"]
    tls.url = lambda path: f"https://tls.test:{tls.port}{path}"
    outcomes = fetch(make(engine=engine, max_bytes=10**9), *map(tls.url, paths))
    assert outcomes == [None, None, None, "not_found", None, "small_image"]
    assert tls.poured < servers.HUGE / 4


def test_drops_connection_error_of_a_certificate_for_somebody_else(make, tls, engine):
    assert fetch(make(engine=engine), f"https://other.test:{tls.port}/ok.jpg") == [DropReason.CONNECTION_ERROR]
    assert not tls.hits


def test_drops_connection_error_of_a_certificate_that_nobody_vouches_for(make, tls, engine, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    tls_context.cache_clear()
    assert fetch(make(engine=engine), f"https://tls.test:{tls.port}/ok.jpg") == [DropReason.CONNECTION_ERROR]
    assert not tls.hits


@pytest.mark.parametrize("port", ["silent", "full"])
def test_drops_timeout_of_a_handshake_or_connection_that_is_never_answered(make, server, engine, port):
    full, stuffing = hostile.full_listener()
    begun = time.monotonic()
    url = f"https://a.test:{server.port if port == 'silent' else full}/x.jpg"
    assert fetch(make(engine=engine, timeout_s=0.5), url) == [DropReason.TIMEOUT]
    assert time.monotonic() - begun < 30
    for each in stuffing:
        each.close()


# Names


def test_a_name_is_looked_up_again_in_time_and_checked_again(make, server, names, monkeypatch):
    monkeypatch.setattr(resolve, "_KEPT_S", 1.0)
    download = make()
    url = f"http://rebinding-1.test:{server.port}/404.jpg"
    assert fetch(download, url) == ["not_found"]
    server.answers["/404.jpg"] = servers.breaks_off(head("404 Not Found", 0))
    time.sleep(1.1)
    assert fetch(download, url) == [DropReason.FORBIDDEN_ADDRESS]
    assert names.looked_up["rebinding-1.test"] == 2
    assert set(names.tried) == {"127.0.0.1"}


def test_names_are_looked_up_once_and_failures_too(make, server, names):
    download = make()
    for _ in range(3):
        assert fetch(download, *[f"http://a.test:{server.port}/404.jpg"] * 9) == ["not_found"] * 9
        assert fetch(download, *["http://no-such-name-1.test/"] * 9) == ["dns_error"] * 9
    assert names.looked_up == {"a.test": 1, "no-such-name-1.test": 1}


def test_a_look_up_that_hangs_costs_its_own_rows_alone(make, server, names, monkeypatch):
    hang = threading.Event()
    quick = names.getaddrinfo

    def lookup(host, *args, **named):
        if host == "slow.test":
            hang.wait(60)
        return quick(host, *args, **named)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    begun = time.monotonic()
    urls = [f"http://slow.test:{server.port}/ok.jpg"] * 3 + [f"http://a.test:{server.port}/ok.jpg"] * 3
    assert fetch(make(timeout_s=2.0), *urls) == ["timeout"] * 3 + [None] * 3
    assert time.monotonic() - begun < 30
    hang.set()


def test_who_took_how_long_is_known_by_host_and_of_the_resolver(make, server, names, engine, monkeypatch):
    quick = names.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **named: time.sleep(0.1) or quick(*args, **named))
    server.answers["/silent.jpg"] = hostile.silent
    download = make(engine=engine, timeout_s=1.0)
    hosts = {"a.test": "/ok.jpg", "b.test": "/404.jpg", "slow.test": "/silent.jpg", "no-such-name-1.test": "/ok.jpg"}
    fetch(download, *[f"http://{host}:{server.port}{path}" for host, path in hosts.items()], "no URL")
    times = download.take_times()
    assert times.fetches == {**dict.fromkeys(hosts, 1), RESOLVER: 3}
    assert times.microseconds[RESOLVER] >= 300_000
    assert times.microseconds["slow.test"] >= 990_000 > times.microseconds["a.test"] >= 100_000
    assert not download.take_times().fetches


def test_of_hundreds_of_addresses_a_few_are_tried(make, names, engine, monkeypatch):
    dead = servers.free_port()
    monkeypatch.setattr(names, "addresses", lambda host: [f"127.0.1.{n}" for n in range(1, 200)])
    assert fetch(make(engine=engine), f"http://many.test:{dead}/") == [DropReason.CONNECTION_ERROR]
    assert len(names.tried) == 4


def test_an_address_that_does_not_answer_leaves_time_for_the_next(make, server, engine, monkeypatch, names):
    real = names.connect

    def connect(link_, place):
        if place[0] == "127.0.3.3":
            place = ("127.0.0.1", full)
        real(link_, place)

    full, stuffing = hostile.full_listener()
    monkeypatch.setattr(names, "connect", connect)
    monkeypatch.setattr(names, "addresses", lambda host: ["127.0.3.3", "127.0.0.1"])
    assert fetch(make(engine=engine, timeout_s=2.0), f"http://two.test:{server.port}/ok.jpg") == [None]
    for each in stuffing:
        each.close()


@pytest.mark.parametrize("host", ["[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "0177.1", "2130706433", "127.0.0.1.", "0"])
def test_drops_forbidden_address_however_loopback_is_spelled(make, names, engine, host):
    assert fetch(make(engine=engine, allow_loopback=False), f"http://{host}/x.jpg") == [DropReason.FORBIDDEN_ADDRESS]
    assert not names.tried


# Connections that are used again


def padded(side, size):
    return servers.jpeg(side).ljust(size, b"\0")


def accepted(server):
    """Counts the connections that a server accepts."""
    counts, serve = [], server._serve
    server._serve = lambda plain: (counts.append(1), serve(plain))
    return counts


def test_a_connection_is_used_again_once_a_body_was_read_to_its_end(make, server):
    counts = accepted(server)
    download = make()
    server.answers["/long.jpg"] = says(body=padded(1100, 300_000))
    for path in ("/ok.jpg", "/404.jpg", "/long.jpg", "/chunked.jpg", "/empty.jpg", "/gzip.jpg", "/hop1.jpg", "/ok.jpg"):
        fetch(download, server.url(path))
    assert len(counts) == 1


@pytest.mark.parametrize(
    "path", ["/small-then-huge.jpg", "/page-then-huge.jpg", "/bad-chunk.jpg", "/without-length.jpg"]
)
def test_and_not_otherwise(make, server, path):
    counts = accepted(server)
    download = make(max_bytes=10**9)
    fetch(download, server.url(path))
    assert fetch(download, server.url("/ok.jpg")) == [None]
    assert len(counts) == 2


def test_a_hopeless_image_is_not_read_on_over_a_used_connection_either(make, server):
    server.answers |= {"/small.jpg": servers.pours(padded(400, 100_000), None), "/large.jpg": says(body=servers.LARGE)}
    download = make(max_bytes=10**9)
    for path in ("/small.jpg", "/large.jpg", "/small.jpg", "/404.jpg", "/small.jpg"):
        fetch(download, server.url(path))
    server.settle()
    assert server.hits["/small.jpg"] == 3
    assert server.poured < 3 * servers.HUGE / 4


@pytest.mark.parametrize("body", [servers.LARGE, padded(1100, 300_000)], ids=["short", "long"])
def test_what_a_host_sends_unasked_is_no_answer_to_the_next_request(make, server, body):
    forged = head(length=len(servers.SMALL)) + servers.SMALL
    server.answers["/forged.jpg"] = lambda link_, _: link_.sendall(head(length=len(body)) + body + forged)
    server.answers["/late.jpg"] = lambda link_, _: (
        link_.sendall(head(length=len(body)) + body),
        time.sleep(0.05),
        link_.sendall(forged),
    )
    download = make()
    for path in ("/forged.jpg", "/late.jpg"):
        assert fetch(download, server.url(path)) == [None]
        time.sleep(0.1)
        assert fetch(download, server.url("/404.jpg")) == ["not_found"]


def test_a_host_that_closed_a_resting_connection_is_not_to_blame(make, server):
    server.answers["/ok.jpg"] = servers.breaks_off(head(length=len(servers.LARGE)) + servers.LARGE)
    download = make()
    assert [fetch(download, server.url("/ok.jpg")) for _ in range(20)] == [[None]] * 20
    assert server.hits["/ok.jpg"] == 20


def test_resting_connections_are_few_and_close_soon(make, server, monkeypatch):
    monkeypatch.setattr(client, "_IDLE_S", 0.5)
    before = len(os.listdir("/proc/self/fd"))
    download = make(concurrency=8, per_host=8)
    fetch(download, *[f"http://h{n}.test:{server.port}/404.jpg" for n in range(60)])
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 5 * 8 + 30  # the server's ends are counted too
    until = time.monotonic() + 60
    while len(os.listdir("/proc/self/fd")) > before + 10 and time.monotonic() < until:
        time.sleep(0.1)
    assert len(os.listdir("/proc/self/fd")) <= before + 10


# Bytes that are gathered


LONG = padded(1100, 500_000)


def send_packets(link_, data, pause_s=0.0):
    link_.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for start in range(0, len(data), 1400):
        link_.sendall(data[start : start + 1400])
        time.sleep(pause_s)


def test_of_a_long_image_not_every_packet_wakes_us(make, server, monkeypatch):
    pieces = []
    feed = Body.feed
    monkeypatch.setattr(Body, "feed", lambda self, piece: pieces.append(len(piece)) or feed(self, piece))
    server.answers["/long.jpg"] = lambda link_, _: send_packets(link_, head(length=len(LONG)) + LONG, 0.0005)
    assert fetch(make(timeout_s=60.0), server.url("/long.jpg")) == [None]
    assert sum(pieces) == len(LONG)
    assert len(pieces) < 80  # of 358 packets


@pytest.mark.parametrize("left", [1, 700, 15_000, 40_000])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_end_of_a_long_image_is_noticed_however_it_comes(make, server, tls, scheme, left):
    tls.answers["/long.jpg"] = server.answers["/long.jpg"] = lambda link_, _: (
        link_.sendall(head(length=len(LONG)) + LONG[:-left]),
        time.sleep(0.2),
        send_packets(link_, LONG[-left:]),
    )
    url = f"https://tls.test:{tls.port}/long.jpg" if scheme == "https" else server.url("/long.jpg")
    assert fetch(make(timeout_s=60.0), url, url) == [None, None]


def test_nor_is_it_missed_where_a_record_of_tls_comes_in_parts(make, tls):
    def pass_back(onward, link_):
        with contextlib.suppress(OSError):  # the other direction closed both
            for data in iter(lambda: onward.recv(1000), b""):
                send_packets(link_, data, 0.0005)

    def pass_on():
        with (
            contextlib.suppress(OSError),
            relay.accept()[0] as link_,
            socket.create_connection(("127.0.0.1", tls.port)) as onward,
        ):
            threading.Thread(target=pass_back, args=(onward, link_), daemon=True).start()
            for data in iter(lambda: link_.recv(9999), b""):
                onward.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as relay:
        threading.Thread(target=pass_on, daemon=True).start()
        tls.answers["/long.jpg"] = says(body=LONG)
        url = f"https://tls.test:{relay.getsockname()[1]}/long.jpg"
        assert fetch(make(timeout_s=60.0), url) == [None]


@pytest.mark.parametrize("reset", [False, True])
def test_drops_incomplete_body_of_a_long_image_that_breaks_off(make, server, reset):
    server.answers["/broken.jpg"] = servers.breaks_off(head(length=len(LONG)) + LONG[:100_000], reset)
    assert fetch(make(timeout_s=60.0), server.url("/broken.jpg")) == [DropReason.INCOMPLETE_BODY]


# Floods


def test_a_flood_of_single_bytes_is_let_to_gather(make, server, monkeypatch):
    def drizzle(link_, _):
        link_.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link_.sendall(head(length=1_000_000))
        while True:
            link_.send(b"\1")

    pieces = []
    feed = Body.feed
    monkeypatch.setattr(Body, "feed", lambda self, piece: pieces.append(1) or feed(self, piece))
    server.answers["/drizzle.jpg"] = drizzle
    begun = time.monotonic()
    fetch(make(timeout_s=1.0), server.url("/drizzle.jpg"))
    assert len(pieces) < 60 + 300 * (time.monotonic() - begun)


def test_bombs_do_not_hold_up_the_others(make, server):
    urls = [server.url("/bomb.jpg")] * 8 + [f"http://b.test:{server.port}/ok.jpg"] * 20
    reasons = fetch(make(max_bytes=20_000_000, timeout_s=5.0), *urls)
    assert set(reasons[:8]) <= {"too_many_bytes", "timeout"}  # the latter where the machine is busy
    assert reasons[8:] == [None] * 20


def test_a_large_length_alone_takes_no_memory(make, server):
    import tracemalloc

    server.answers["/promise.jpg"] = lambda link_, _: (
        link_.sendall(head(length=40_000_000) + servers.LARGE),
        hostile.silent(link_, _),
    )
    download = make(timeout_s=0.5, per_host=64)
    tracemalloc.start()
    assert fetch(download, *[server.url("/promise.jpg")] * 20) == ["timeout"] * 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 3_000_000


@pytest.mark.parametrize("field", ["user_agent", "contact"])
def test_nothing_slips_into_the_request_by_the_config(field):
    with pytest.raises(ValueError, match=field):
        DownloadSettings(**{field: "x\r\nCookie: a=b"})
