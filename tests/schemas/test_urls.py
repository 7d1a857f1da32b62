"""The one form of a URL: what is sent, what is refused, and which spellings are the same."""

import contextlib
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from schemas import urls
from schemas.urls import BadUrl, host_of, identity, parse


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("  http://a.test ", "http://a.test/"),
        ("HTTP://A.test/x?q=%2F&r=%41#frag", "http://a.test/x?q=%2F&r=%41"),
        ("http://a.test/a b/ü.jpg", "http://a.test/a%20b/%C3%BC.jpg"),
        ("http://bücher.test:8080/", "http://xn--bcher-kva.test:8080/"),
        ("http://a.test/100%.jpg?s={1|2}", "http://a.test/100%.jpg?s=%7B1%7C2%7D"),
        ("http://a.test/b/../c/./%2E%2e/d%2F/.?x=/../", "http://a.test/d%2F/?x=/../"),
        ("http://a.test/..", "http://a.test/"),
        ("http://a.test//../.b/..c//", "http://a.test/.b/..c//"),
        ("http://[2001:DB8:0::1]:80/a", "http://[2001:db8::1]/a"),
    ],
)
def test_a_url_is_sent_as_written_where_that_is_possible(written, sent):
    assert str(parse(written)) == sent


@pytest.mark.parametrize(
    ("host", "ascii"),
    [
        ("straße.test", "xn--strae-oqa.test"),
        ("STRAẞE.test", "xn--strae-oqa.test"),
        ("ΣΊΓΜΑΣ.test", "xn--kxaef0b6ae.test"),
        ("ﬁ.test", "fi.test"),
        ("１２７.0.0.1", "127.0.0.1"),
        ("日本。test", "xn--wgv71a.test"),
        ("☃.test", "xn--n3h.test"),
    ],
)
def test_hosts_are_looked_up_as_browsers_do(host, ascii):
    assert parse(f"http://{host}/").host == ascii


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "http://a b/",
        "http://a.test/\nHost: x",
        "http://%31.0.0.1/",
        "http://a.test:99999/",
        "http://a.test:８０/",
        "javascript:1",
        "//a.test/x",
        "ftp://a.test/",
        "http://[::1",
        "http://[::1]@",
        "http://[::1]x/",
        "http://\udcff/",
        "http://a.test/\udcff ",
        "http://user@a.test/",
        "http://:secret@a.test/",
        "http://good.test\\@a.test/",
        "http:///x.jpg",
        "http://。/",
        "http://[fe80::1%25eth0]/",
        "http://e\u200bvil.test/",
        "http://e\ufe0fvil.test/",
        "http://" + "ü" * 60 + ".test/",
        "http://a.test:0/",
        "http://a.test:0/ü.jpg",
        "http://[2001:db8::1]:00/",
        "https://a.test:22/",
        "http://a.test:6667/x",
        "http://a.test/#\0",
        "http://a.test/" + "x" * 9000,
    ],
)
def test_malformed_urls_are_bad_urls(text):
    with pytest.raises(BadUrl):
        parse(text)


def test_urls_of_no_port_of_the_web_are_a_short_list():
    assert {25, 110, 6000, 10080} <= urls.OTHER_SERVICES
    assert not {80, 81, 443, 3000, 5000, 8000, 8080, 8443, 8888, 9000} & urls.OTHER_SERVICES
    assert len(urls.OTHER_SERVICES) < 100


SAME = [
    ["http://Example.ORG/a.jpg", "https://example.org:443/a.jpg", "http://u:p@example.org./a.jpg#x", "http://example.org/%61.jpg"],
    ["http://bücher.example/ä", "HTTP://xn--bcher-kva.example:80/%C3%A4", "https://BÜCHER.example/%c3%a4"],
    ["http://example.org", "https://example.org/", "http://example.org/?", "http://example.org#top"],
    ["http://e.org/a?b=c%20d", "http://e.org/a?b=c+d#e"],
    ["http://e.org/x/../a", "http://e.org/./a", "http://e.org/a", "http://e.org/%2E/a", "http://e.org:/a", "http://@e.org/a"],
    ["http://[2001:db8::1]/a", "http://[2001:DB8:0::1]:80/a"],
    ["  http://e.org/a b ", "http://e.org/a%20b"],
    ["http://e.org/?a=%2b%26", "http://e.org/?%61=%2B%26"],
    ["http://e.org/%ff", "http://e.org/%FF"],
    ["junk", " junk\n"],
]  # fmt: skip


@pytest.mark.parametrize("same", SAME)
def test_all_spellings_of_a_url_have_one_identity(same):
    assert len(set(map(identity, same))) == 1


def test_other_urls_have_other_identities():
    others = [names[0] for names in SAME] + [
        "http://e.org/A",
        "http://e.org:8080/a",
        "http://e.org/a/",
        "http://e.org/a?b",
        "http://e.org/a?b=c%2Bd",
        "http://e.org/?a=%2b&",
        "http://www.e.org/a",
        "http://e.org/%25FF",
    ]
    assert len(set(map(identity, others))) == len(others) - 1  # %25FF and %FF
    assert identity("http://e.org/%25FF") == identity("http://e.org/%FF")


def written(low="!", exclude=""):
    """Visible ASCII."""
    return st.text(st.characters(min_codepoint=ord(low), max_codepoint=126, exclude_characters=exclude), max_size=12)


HOSTS = st.from_regex(r"[A-Za-z0-9-]{1,5}(\.[A-Za-z0-9-]{1,5}){0,3}\.?", fullmatch=True)
TAILS = st.builds(
    lambda path, query: f"/{path}" + ("" if query is None else f"?{query}"),
    written(exclude="?#"),
    st.none() | written(exclude="#"),
)


@given(HOSTS, TAILS)
def test_the_short_ways_lead_where_the_long_ones_do(host, tail):
    # a default port, or an empty user, keeps a URL from the short ways, and means nothing
    assert identity(f"http://{host}{tail}") == identity(f"http://{host}:80{tail}")
    assert host_of(f"http://{host}{tail}") == host_of(f"http://{host}:80{tail}") == host.lower().rstrip(".")
    assert parse(f"http://{host}{tail}") == parse(f"http://@{host}{tail}")


@given(HOSTS, TAILS)
def test_what_is_sent_is_what_was_meant(host, tail):
    url = parse(f"https://{host}{tail}")
    assert parse(str(url)) == url
    assert identity(str(url)) == identity(f"https://{host}{tail}")
    assert not re.search(r"/\.\.?(/|$)", url.target.partition("?")[0])


@given(HOSTS, TAILS, st.data())
def test_however_a_url_is_written_its_identity_is_one(host, tail, data):
    """Scheme, case of the host, port, user, fragment, dot segments, and percent-encoding of what needs none."""
    path, mark, query = tail.partition("?")
    encoded = "".join(
        f"%{ord(char):02x}" if char.isalnum() and not before.endswith("%") and data.draw(st.booleans()) else char
        for before, char in zip([path[: n + 1] for n in range(len(path))], path[1:], strict=False)
    )
    assume("%" not in path)
    user, dots = data.draw(st.sampled_from(["", "me@", "me:secret@"])), data.draw(st.sampled_from(["", "/.", "/x/.."]))
    scheme, port = data.draw(st.sampled_from([("http", ""), ("HTTPS", ""), ("https", ":443"), ("http", ":80")]))
    other = f" {scheme}://{user}{host.upper().rstrip('.')}{port}{dots}/{encoded}{mark}{query}#there"
    assert identity(other) == identity(f"http://{host}{tail}")


@given(HOSTS, st.lists(st.text("abc", min_size=1), min_size=1), HOSTS, st.lists(st.text("abc", min_size=1), min_size=1))
def test_two_urls_are_one_only_where_host_and_path_are(one, path, other, further):
    same = (one.lower().rstrip("."), path) == (other.lower().rstrip("."), further)
    assert (identity(f"http://{one}/{'/'.join(path)}") == identity(f"http://{other}/{'/'.join(further)}")) is same


@pytest.mark.parametrize(
    "text",
    [
        "http://e.org" + "/a" * 200_000 + "/.." * 200_000,
        f"http://{'ü' * 100_000}/",
        "http://e.org/?" + "%26+" * 200_000,
    ],
    ids=["dots", "host", "query"],
)
def test_the_time_of_a_look_grows_with_the_length_alone(text):
    """A part may hold a URL of a megabyte; with the square of it, each of these would take minutes."""
    assert len(identity(text)) <= len(text)


@given(st.text() | st.from_regex(r"https?://.{0,40}"))
def test_any_text_has_an_identity_and_is_a_url_or_not(text):
    assert isinstance(identity(text) + host_of(text), str)
    with contextlib.suppress(BadUrl):
        assert identity(str(parse(text))) == identity(text)
