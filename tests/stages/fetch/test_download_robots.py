"""What sites ask for: robots.txt before the first request, and no request after a refusal."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import hostile
import pyarrow as pa
import pytest
import servers

from schemas.drops import DropReason
from stages.base import DROP
from stages.download import Download
from stages.fetch import once
from stages.fetch.manners import robots as manners
from stages.runtime import Runtime
from stages.settings import DownloadSettings, Settings

says, redirects = servers.says, servers.redirects


pytestmark = pytest.mark.usefixtures("names")


@pytest.fixture
def stage(engine):
    """A function that makes stages of either engine, and closes them in the end."""
    made = []

    def make(runtime=None, **told):
        base = {"engine": engine, "allow_loopback": True, "timeout_s": 2.0, "retries": 0}
        made.append(Download(Settings(download=DownloadSettings(**base | told)), runtime or Runtime()))
        return made[-1]

    yield make
    for download in made:
        download.close()


def fetch(stage, *urls):
    table = pa.table({"url": pa.array(urls, pa.string()), "image_ref": pa.nulls(len(urls), pa.string())})
    return stage(table)[DROP].to_pylist()


def robots(*lines):
    return says(body="\n".join(lines).encode())


def test_drops_robots_txt(stage, server):
    server.answers["/robots.txt"] = robots("User-agent: *", "Disallow: /", "Allow: /ok")
    assert fetch(stage(), server.url("/404.jpg"), server.url("/ok.jpg"), server.url("/query.jpg?a=1&b=%2F")) == [
        DropReason.ROBOTS_TXT,
        None,
        DropReason.ROBOTS_TXT,
    ]
    assert set(server.hits) == {"/robots.txt", "/ok.jpg"}


def test_our_own_name_counts_and_it_follows_the_user_agent(stage, server):
    server.answers["/robots.txt"] = robots("User-agent: faceshards", "Disallow: /", "", "User-agent: *", "Allow: /")
    assert fetch(stage(), server.url("/ok.jpg")) == [DropReason.ROBOTS_TXT]
    assert fetch(stage(user_agent="otherbot/1"), server.url("/ok.jpg")) == [None]


def test_respect_robots_can_be_switched_off(stage, server):
    server.answers["/robots.txt"] = robots("User-agent: *", "Disallow: /")
    assert fetch(stage(respect_robots=False), server.url("/ok.jpg")) == [None]
    assert server.hits["/robots.txt"] == 0


def test_each_host_is_asked_once_however_many_rows_wait(stage, server):
    def slow(link, hostile_server):
        time.sleep(0.2)
        robots("User-agent: *", "Disallow: /no")(link, hostile_server)

    server.answers["/robots.txt"] = slow
    download = stage(per_host=8)
    urls = [f"http://{host}.test:{server.port}/{path}" for host in "ab" for path in ("ok.jpg", "no.jpg")] * 10
    with ThreadPoolExecutor(4) as pool:
        assert all(
            result == [None, "robots_txt"] * 20 for result in pool.map(lambda _: fetch(download, *urls), range(4))
        )
    assert server.hits["/robots.txt"] == 2
    assert server.hits["/no.jpg"] == 0


@pytest.mark.parametrize(
    "answer",
    [
        says("404 Not Found"),
        says("401 Unauthorized"),
        says("403 Forbidden"),
        says(body=servers.HTML),
        says(body=b""),
        says("204 No Content"),
        says("418 I'm a teapot"),
        servers.breaks_off(b"SSH-2.0 no http"),
        redirects("/robots.txt"),
        redirects("http://10.0.0.1/robots.txt"),
        redirects("http://no-such-name-1.test/robots.txt"),
        redirects("file:///etc/hostname"),
    ],
)
def test_a_host_that_has_none_allows_all(stage, server, answer, names):
    server.answers["/robots.txt"] = answer
    assert fetch(stage(), server.url("/ok.jpg")) == [None]
    assert set(names.tried) == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (says("500 Internal Server Error"), "server_error"),
        (says("503 Service Unavailable", Retry_After="3600"), "server_error"),
        (says("429 Too Many Requests"), "rate_limited"),
        (servers.breaks_off(b"", reset=True), "connection_error"),
        (servers.drips(servers.head(length=5000)), "timeout"),
        (hostile.silent, "timeout"),
        (servers.breaks_off(servers.head(length=50) + b"User-agent: *\n"), "incomplete_body"),
    ],
)
def test_while_a_host_cannot_say_what_it_allows_nothing_is_asked_for(stage, server, answer, reason, monkeypatch):
    monkeypatch.setattr(manners, "LIMIT_S", 0.5 if reason == "timeout" else 60.0)
    server.answers["/robots.txt"] = answer
    assert fetch(stage(timeout_s=60.0), *[server.url("/ok.jpg")] * 3) == [reason] * 3
    assert server.hits == {"/robots.txt": 1}


def test_a_host_whose_robots_txt_wants_rest_is_left_alone_for_so_long(stage, server, monkeypatch):
    monkeypatch.setattr(once, "FAILED_S", 0.0)
    server.answers["/robots.txt"] = says("503 Service Unavailable", Retry_After="3600")
    download = stage()
    for _ in range(2):
        assert fetch(download, server.url("/ok.jpg")) == ["server_error"]
    assert server.hits == {"/robots.txt": 1}


def test_a_transient_failure_of_robots_txt_is_tried_again(stage, server):
    server.answers["/robots.txt"] = servers.first_then(says("500 Oops"), robots("User-agent: *", "Disallow: /no"))
    assert fetch(stage(retries=1), server.url("/ok.jpg"), server.url("/no.jpg")) == [None, "robots_txt"]
    assert server.hits["/robots.txt"] == 2


def test_robots_txt_may_lie_behind_redirects_and_chunks(stage, server):
    server.answers["/robots.txt"] = redirects("/there")
    server.answers["/there"] = redirects(f"http://elsewhere.test:{server.port}/at-last")
    body = b"User-agent: *\nDisallow: /no\n"
    server.answers["/at-last"] = lambda link, _: link.sendall(
        servers.head(Transfer_Encoding="chunked") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    )
    assert fetch(stage(), server.url("/no.jpg"), server.url("/ok.jpg")) == ["robots_txt", None]


@pytest.mark.parametrize(("coding", "reason"), [("br", "robots_txt"), ("utf-8", None)])
def test_what_cannot_be_unpacked_is_a_no(stage, server, coding, reason):
    server.answers["/robots.txt"] = says(body=b"\x0b\x02\x80abc\x03", Content_Encoding=coding)
    assert fetch(stage(), server.url("/ok.jpg")) == [reason]


def test_only_the_first_half_megabyte_is_read(stage, server):
    rule = b"User-agent: *\nDisallow: /no\n#"
    server.answers["/robots.txt"] = servers.pours(rule, None)
    assert fetch(stage(), server.url("/no.jpg"), server.url("/ok.jpg")) == ["robots_txt", None]
    assert server.poured < 16 << 20


def test_it_may_be_larger_than_an_image_may(stage, server):
    server.answers["/robots.txt"] = robots("User-agent: *", "Disallow: /no", "#" * 300_000, "Disallow: /ok")
    urls = server.url("/no.jpg"), server.url("/ok.jpg"), server.url("/small.jpg")
    assert fetch(stage(max_bytes=100_000), *urls) == ["robots_txt", "robots_txt", "small_image"]


def test_a_redirect_is_checked_at_the_host_that_it_leads_to(stage, server):
    inner = servers.HostileServer()
    try:
        inner.answers["/robots.txt"] = robots("User-agent: *", "Disallow: /")
        server.answers["/away.jpg"] = redirects(inner.url("/ok.jpg"))
        assert fetch(stage(), server.url("/away.jpg")) == [DropReason.ROBOTS_TXT]
        assert inner.hits == {"/robots.txt": 1}
    finally:
        inner.close()


def test_http_and_https_and_ports_are_hosts_of_their_own(stage, server):
    other = servers.HostileServer()
    try:
        server.answers["/robots.txt"] = robots("User-agent: *", "Disallow: /")
        assert fetch(stage(), server.url("/ok.jpg"), other.url("/ok.jpg")) == ["robots_txt", None]
    finally:
        other.close()


# No request after a refusal


REFUSALS = {
    "/noai.jpg": "opted_out",
    "/403.jpg": "access_denied",
    "/451.jpg": "access_denied",
    "/to-private.jpg": "forbidden_address",
    "/hop-noai.jpg": "opted_out",
}


@pytest.mark.parametrize("path", REFUSALS)
def test_a_refused_url_is_not_asked_for_again(stage, server, path):
    server.answers["/hop-noai.jpg"] = redirects("/noai.jpg")
    download = stage()
    for _ in range(3):
        assert fetch(download, server.url(path), server.url("/404.jpg")) == [REFUSALS[path], "not_found"]
    assert (server.hits[path], server.hits["/404.jpg"]) == (1, 3)


def test_a_redirect_to_a_refused_url_is_not_followed(stage, server):
    server.answers["/hop-noai.jpg"] = redirects("/noai.jpg")
    download = stage()
    assert fetch(download, server.url("/noai.jpg")) == ["opted_out"]
    assert fetch(download, server.url("/hop-noai.jpg")) == ["opted_out"]
    assert (server.hits["/noai.jpg"], server.hits["/hop-noai.jpg"]) == (1, 1)


def test_workers_of_a_run_share_what_was_refused(stage, server, tmp_path):
    runtime = Runtime(refusals=str(tmp_path / "refusals"))
    first, second = stage(runtime), stage(runtime)
    assert fetch(first, server.url("/noai.jpg")) == ["opted_out"]
    assert fetch(second, server.url("/noai.jpg")) == ["opted_out"]
    assert fetch(second, server.url("/403.jpg")) == ["access_denied"]
    assert fetch(first, server.url("/403.jpg")) == ["access_denied"]
    assert (server.hits["/noai.jpg"], server.hits["/403.jpg"]) == (1, 1)


def test_no_packet_goes_to_a_refused_address_ever(stage, names):
    download = stage()
    for _ in range(2):
        assert (
            fetch(download, "http://private-name-1.test/x", "http://0xa9.0xfe.0251.0376/") == ["forbidden_address"] * 2
        )
    assert not names.tried
    assert socket.getaddrinfo == names.getaddrinfo
